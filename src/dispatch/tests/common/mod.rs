//! Memory for an arena, as the server lends it: here from vectors.

use queue_dispatch::{Arena, Config, Db, Effects, Head, Parts, Queue, Slot, WaitNode, Waiter, WAIT_QUEUES_MAX};

/// What [`Parts`] borrows.
pub struct Memory {
    head: Head,
    queues: Vec<Queue>,
    queue_buckets: Vec<u32>,
    slots: Vec<Slot>,
    slot_buckets: Vec<u32>,
    waiters: Vec<Waiter>,
    wait_nodes: Vec<WaitNode>,
    dbs: Vec<Db>,
}

impl Memory {
    /// Room for so many queues, slots and backends, already reset.
    pub fn new(queues: usize, slots: usize, backends: usize, config: Config, seed: u64) -> Memory {
        let mut memory = Memory {
            head: Head::EMPTY,
            queues: vec![Queue::FREE; queues],
            queue_buckets: vec![0; queues.next_power_of_two()],
            slots: vec![Slot::FREE; slots],
            slot_buckets: vec![0; slots.next_power_of_two()],
            waiters: vec![Waiter::IDLE; backends],
            wait_nodes: vec![WaitNode::FREE; backends * WAIT_QUEUES_MAX],
            dbs: vec![Db::FREE; 4],
        };
        memory.arena().reset(config, seed, &mut Effects::new());
        memory
    }

    /// The dispatcher, for one hold of the lock.
    pub fn arena(&mut self) -> Arena<'_> {
        Arena::new(Parts {
            head: &mut self.head,
            queues: &mut self.queues,
            queue_buckets: &mut self.queue_buckets,
            slots: &mut self.slots,
            slot_buckets: &mut self.slot_buckets,
            waiters: &mut self.waiters,
            wait_nodes: &mut self.wait_nodes,
            dbs: &mut self.dbs,
        })
    }
}
