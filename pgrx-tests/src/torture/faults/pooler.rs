//! The pooler dies: every client's connection ends at once, and every transaction that was open with it. Only where
//! clients come through one.

use anyhow::Result;

use super::{Fault, Proof, Struck};
use crate::pooler::{find_pgbouncer, Pooler};
use crate::torture::rng::Rng;
use crate::torture::world::{World, DATABASE};

/// Sessions for all clients together: fewer than there are clients, so that they take turns.
pub const SESSIONS: u32 = 4;

/// From its preparation on clients come through a pooler.
#[derive(Default)]
pub struct PoolerKilled {
    pooler: Option<Pooler>,
}

impl Fault for PoolerKilled {
    fn name(&self) -> &'static str {
        "kill-pooler"
    }

    fn skipped(&self, _world: &World) -> Option<String> {
        find_pgbouncer().is_none().then(|| "there is no pgbouncer on this machine".to_owned())
    }

    fn prepare(&mut self, world: &World) -> Result<()> {
        let pooler = Pooler::start(&world.cluster(), DATABASE, SESSIONS)?;
        world.set_detour(Some(pooler.config(DATABASE)));
        self.pooler = Some(pooler);
        Ok(())
    }

    fn strike(&mut self, world: &World, _rng: &mut Rng) -> Result<Struck> {
        let Some(pooler) = &mut self.pooler else { return Ok(Struck::Missed("there is no pooler".to_owned())) };
        let (sql, mut admin) = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name <> 'pg_queue-harness' \
            AND backend_type = 'client backend' AND datname = current_database()",
            world.admin()?,
        );
        let sessions: i64 = admin.query_one(sql, &[])?.get(0);
        let (from_us, open_calls, old) = (world.now_us(), world.open_calls().len(), pooler.pid());
        if open_calls == 0 {
            return Ok(Struck::idle());
        }
        // Else they do not take turns, and it is no pooler.
        let clients = world.connected();
        if sessions > i64::from(SESSIONS) || clients <= SESSIONS as usize {
            return Ok(Struck::Missed(format!("{sessions} sessions for {clients} clients")));
        }
        pooler.kill_and_restart(&world.cluster(), DATABASE)?;
        let seen = format!("pooler {old} -> {}; {sessions} sessions served {clients} clients", pooler.pid());
        Ok(Struck::Hit(Proof { from_us, to_us: world.now_us(), open_calls, seen }))
    }
}
