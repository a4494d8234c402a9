//! Rules that can be broken on purpose, to see that the torture's checker notices, or valgrind. In builds with the feature
//! `wait_points` only. Owns the setting `pg_queue.break_rule`; what is done instead stands where the rule is kept.

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};

/// What may be broken.
#[allow(non_camel_case_types)] // the setting's values are made from these names
#[derive(Clone, Copy, PartialEq, Eq, Debug, PostgresGucEnum)]
pub enum Rule {
    /// Nothing.
    none,
    /// A send is published at once, not at commit: whoever takes it finds no row and drops it.
    publish_before_commit,
    /// The same, and readers are given rows that are not committed.
    read_uncommitted,
    /// A load ends as if it had read everything, and has read nothing.
    skip_reload,
    /// A finish does not look at its lease.
    no_fence,
    /// A lease ends after a tenth of its time.
    short_leases,
    /// The worker takes leases for written, and writes none.
    skip_lease_flush,
    /// A read of a queue with durable leases does not wait until they are written, and the worker takes its time.
    no_durable_wait,
    /// A read looks at memory that has been freed.
    use_freed_memory,
}

static BREAK_RULE: GucSetting<Rule> = GucSetting::<Rule>::new(Rule::none);

/// In `_PG_init`.
pub fn define() {
    GucRegistry::define_enum_guc(
        c"pg_queue.break_rule",
        c"The rule that this build breaks on purpose.",
        c"Only in builds for tests.",
        &BREAK_RULE,
        GucContext::Sighup,
        GucFlags::default(),
    );
}

/// Whether this rule is to be broken.
pub fn is(rule: Rule) -> bool {
    BREAK_RULE.get() == rule
}

/// What valgrind is to notice: a decision that hangs on memory that has been freed.
pub fn use_freed_memory() {
    // SAFETY: none; that is what it is for. The memory stays the process's own (a block of a memory context), so without
    // valgrind nothing comes of it.
    let byte = unsafe {
        let memory = pgrx::pg_sys::palloc0(64).cast::<u8>();
        pgrx::pg_sys::pfree(memory.cast());
        memory.add(40).read_volatile()
    };
    if byte == 1 {
        pgrx::debug1!("freed memory holds a 1");
    }
}
