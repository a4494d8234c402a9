//! What memory itself costs: one step to a random place in as many slots. Owns the comparison; a descent of a
//! tree is about so many of these as it is deep, less what the near caches hold of its top.

use std::hint::black_box;
use std::time::Instant;

use criterion::Criterion;

use crate::ledger::Ledger;
use crate::world::Random;

const STEPS: usize = 100_000;

/// As large as a slot, aligned as one.
#[derive(Clone)]
#[repr(C)]
struct Cell {
    next: u64,
    rest: [u64; 9],
}

pub fn run(c: &mut Criterion, ledger: &mut Ledger, n: usize) {
    let mut cells: Option<Vec<Cell>> = None;
    ledger.measure(c, "a dependent step to a random slot", n, || {
        let cells = cells.get_or_insert_with(|| ring(n));
        let mut here = 0;
        let begun = Instant::now();
        for _ in 0..STEPS {
            here = cells[here].next as usize;
        }
        black_box(here);
        (STEPS, begun.elapsed())
    });
}

/// All cells in one ring, in no order.
fn ring(n: usize) -> Vec<Cell> {
    let order = Random(1).shuffled(n);
    let mut cells = vec![Cell { next: 0, rest: [0; 9] }; n];
    for (i, from) in order.iter().enumerate() {
        cells[*from as usize].next = u64::from(order[(i + 1) % n]);
    }
    cells[0].rest[0] = 1; // written, so that it is not taken for unused
    cells
}
