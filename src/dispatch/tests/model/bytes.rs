//! A sequence from bytes: how big the arena is, then four bytes a step. What the fuzzer drives, and what replays its
//! corpus.

use crate::world::World;

/// Steps of one run: the model's tables grow, and each step looks at all of them.
const STEPS_MAX: usize = 300;

pub fn run(data: &[u8]) {
    let Some((&[slots, slots_min, window, seed], steps)) = data.split_first_chunk() else { return };
    let (slots, slots_min, window) = (12 + slots % 28, 1 + slots_min % 3, 4 + window % 12);
    let mut world = World::new(slots.into(), slots_min.into(), window.into(), seed.into());
    for step in steps.chunks_exact(4).take(STEPS_MAX) {
        world.step((step[0] % 100, step[1], step[2], step[3]));
        world.check();
    }
    world.drain();
}
