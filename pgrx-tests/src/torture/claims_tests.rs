//! The claims of `claims` against histories made by hand: each broken once, and beside it what excuses.

use super::checker::{check, Tables};
use super::checker_tests::*;
use super::history::{
    Act, Answer, Blow, BlowAt, Delivered, End, History, Outcome, Sent, Short, Unseen, Us, Verb,
};

const S: Us = 1_000_000;

fn short(began_us: Us) -> Short {
    Short { queue: PLAIN, began_us, returned_us: began_us + 10 }
}

/// Sent at 0, read at 30 s and finished; reads came back short at these times.
fn missed_at(times_us: &[Us]) -> History {
    let mut history = read_at(&[30 * S]);
    history.short = times_us.iter().map(|at_us| short(*at_us)).collect();
    history
}

const STALLED: &[(&str, u64)] = &[("stalled", 1)];

#[test]
fn stalled_when_two_reads_miss_it() {
    assert_broken(&judged(missed_at(&[10 * S, 12 * S])), STALLED);
    assert_broken(&judged(missed_at(&[S, 10 * S, 11 * S])), STALLED);
    // Once, or at once, or before it had to be there, or after it was taken.
    assert_clean(missed_at(&[10 * S]));
    assert_clean(missed_at(&[10 * S, 10 * S + 500_000]));
    assert_clean(missed_at(&[S, 2 * S, 4 * S]));
    assert_clean(missed_at(&[30 * S, 31 * S, 40 * S]));
    // From another queue.
    let mut history = missed_at(&[10 * S, 12 * S]);
    history.short.iter_mut().for_each(|short| short.queue = DURABLE);
    assert_clean(history);
}

#[test]
fn no_stalled_when_not_committed_due_or_there() {
    let with = |spoil: &dyn Fn(&mut History)| {
        let mut history = missed_at(&[10 * S, 12 * S]);
        spoil(&mut history);
        history
    };
    assert_clean(with(&|history| history.sent[0].end.outcome = Outcome::Unknown));
    assert_clean(with(&|history| history.sent[0].due_us = 11 * S));
    let blow = Blow::Failover { kept_until_us: Some(0) };
    let lost = with(&|history| history.blows.push(BlowAt { blow, from_us: 2 * S, to_us: 3 * S }));
    assert_broken(&judged(lost), &[]);
    assert_broken(&judged(with(&|history| history.sent[0].due_us = 7 * S)), STALLED);
    // Never delivered, but in the ledger: taken by somebody whom nobody saw.
    let history = with(&|history| {
        history.delivered.clear();
        history.acts.clear();
    });
    assert_broken(&judged(history.clone()), &[("lost", 1), ("stalled", 1)]);
    let tables = Tables { ledger: vec![7], ..Tables::default() };
    assert_broken(&check(history, &tables, RULES), &[]);
}

#[test]
fn no_stalled_while_it_may_be_leased() {
    let with_lease = |lease_us: Us, end: End| {
        let mut history = missed_at(&[10 * S, 12 * S]);
        history.delivered.insert(0, Delivered { lease_us, end, ..read(7, 9, S) });
        history
    };
    let acknowledged = end(S, S + 10, Outcome::Acknowledged);
    assert_clean(with_lease(9 * S, acknowledged));
    assert_broken(&judged(with_lease(5 * S, acknowledged)), STALLED);
    // Rolled back it is there again; by a transaction that was open for long, when that is over.
    assert_broken(&judged(with_lease(9 * S, end(2 * S, 2 * S, Outcome::RolledBack))), STALLED);
    assert_clean(with_lease(S, end(9 * S, 9 * S, Outcome::RolledBack)));
    assert_clean(with_lease(S, end(9 * S, 9 * S, Outcome::Acknowledged)));
    // Nobody knows whether it was kept: for as long as the lease.
    assert_clean(with_lease(9 * S, end(S, Us::MAX, Outcome::Unknown)));
    assert_broken(&judged(with_lease(S, end(S, Us::MAX, Outcome::Unknown))), STALLED);
}

#[test]
fn no_stalled_after_what_may_keep_it_away() {
    let with_act = |act: Act| {
        let mut history = missed_at(&[10 * S, 12 * S]);
        history.delivered.insert(0, read(7, 9, S));
        history.acts.push(act);
        history
    };
    let retry = act(7, 9, Verb::Retry { delay_us: 8 * S }, S + 100);
    assert_clean(with_act(retry));
    assert_broken(
        &judged(with_act(Act { answer: Answer::Refused, ..retry })),
        &[("stalled", 1), ("refused", 1)],
    );
    assert_broken(&judged(with_act(Act { end: end(S, 2 * S, Outcome::RolledBack), ..retry })), STALLED);
    assert_clean(with_act(Act { end: end(S, Us::MAX, Outcome::Unknown), ..retry }));
    // A finish of which nobody knows what came.
    let finish = act(7, 9, Verb::Finish, S + 100);
    assert_clean(with_act(Act { end: end(S, Us::MAX, Outcome::Unknown), ..finish }));
    assert_broken(&judged(with_act(Act { end: end(S, 2 * S, Outcome::RolledBack), ..finish })), STALLED);
    // Lengthening a lease survives a rollback.
    let extend = act(7, 9, Verb::Extend { lease_us: 8 * S }, S + 100);
    assert_clean(with_act(extend));
    assert_clean(with_act(Act { end: end(S, S + 200, Outcome::RolledBack), ..extend }));
    assert_broken(&judged(with_act(Act { verb: Verb::Extend { lease_us: S }, ..extend })), STALLED);
}

#[test]
fn no_stalled_while_another_may_have_it_or_all_is_loaded() {
    let mut history = missed_at(&[10 * S, 12 * S]);
    let unseen = |from_us, to_us| Unseen { queue: PLAIN, from_us, to_us };
    history.unseen = vec![unseen(9 * S, 10 * S)];
    assert_clean(history.clone());
    history.unseen = vec![unseen(5 * S, 20 * S), unseen(6 * S, 7 * S)];
    assert_clean(history.clone());
    history.unseen = vec![unseen(11 * S, 11 * S)];
    assert_broken(&judged(history.clone()), STALLED);
    history.unseen = vec![Unseen { queue: EXACT, ..unseen(9 * S, 20 * S) }];
    assert_broken(&judged(history.clone()), STALLED);
    history.unseen.clear();
    for at_us in [6 * S, 11 * S] {
        history.blows = vec![crash(at_us, at_us + 10)];
        assert_clean(history.clone());
    }
    history.blows = vec![crash(4 * S, 4 * S), crash(13 * S, 13 * S)];
    assert_broken(&judged(history.clone()), STALLED);
    // Reads do not wait for a worker.
    history.blows = vec![BlowAt { blow: Blow::WorkerAway, ..crash(6 * S, 20 * S) }];
    assert_broken(&judged(history.clone()), STALLED);
    // Before the crash, or after it.
    history.short.extend([short(22 * S), short(24 * S)]);
    history.blows = vec![crash(11 * S, 11 * S)];
    assert_broken(&judged(history), STALLED);
}

#[test]
fn refused_when_its_lease_runs() {
    let refused = Act { answer: Answer::Refused, ..act(7, 1, Verb::Finish, 300) };
    let history = |acts: &[Act]| {
        let mut history = read_at(&[100, 2 * S]);
        history.acts.extend(acts);
        history
    };
    const REFUSED: &[(&str, u64)] = &[("refused", 1)];
    assert_broken(&judged(history(&[refused])), REFUSED);
    for verb in [
        Verb::Archive,
        Verb::Retry { delay_us: 0 },
        Verb::Release { delay_us: 0 },
        Verb::Extend { lease_us: S },
    ] {
        assert_broken(&judged(history(&[Act { verb, ..refused }])), REFUSED);
    }
    // Late, or answered late.
    assert_clean(history(&[Act { returned_us: 100 + LEASE_US, ..refused }]));
    // Something may have ended it, or may have shortened it.
    assert_clean(history(&[act(7, 1, Verb::Release { delay_us: 0 }, 200), refused]));
    let unknown = Act { answer: Answer::Unknown, ..act(7, 1, Verb::Finish, 200) };
    assert_clean(history(&[Act { end: end(200, 210, Outcome::RolledBack), ..unknown }, refused]));
    assert_clean(history(&[act(7, 1, Verb::Extend { lease_us: 50 }, 200), refused]));
    // Not lengthened beyond doubt.
    let late = Act { returned_us: S + 300_000, ..refused };
    assert_clean(history(&[act(7, 1, Verb::Extend { lease_us: LEASE_US }, 800_000), late]));
    // Its reading was rolled back.
    let mut undone = history(&[refused]);
    undone.delivered[0].end = end(200, 210, Outcome::RolledBack);
    assert_clean(undone);
    let mut crashed = history(&[refused]);
    crashed.blows = vec![crash(200, 250)];
    assert_clean(crashed.clone());
    crashed.blows = vec![BlowAt { blow: Blow::WorkerAway, ..crash(200, 250) }];
    assert_broken(&judged(crashed.clone()), REFUSED);
    crashed.blows = vec![crash(400, 450)];
    assert_broken(&judged(crashed), REFUSED);
}

#[test]
fn archive_holds_what_was_archived_and_nothing_else() {
    let in_archive = |keys: &[u64]| Tables { archived: keys.to_vec(), ..Tables::default() };
    const ARCHIVE: &[(&str, u64)] = &[("archive", 1)];
    let mut history = good(7);
    assert_broken(&check(history.clone(), &in_archive(&[7]), RULES), ARCHIVE);
    assert_broken(&check(history.clone(), &in_archive(&[8]), RULES), ARCHIVE);
    history.acts[0].verb = Verb::Archive;
    assert_broken(&check(history.clone(), &in_archive(&[7]), RULES), &[]);
    assert_broken(&check(history.clone(), &in_archive(&[]), RULES), ARCHIVE);
    assert_broken(&check(history.clone(), &in_archive(&[7, 7]), RULES), ARCHIVE);
    history.blows = vec![failover(Some(210), 300, 400)];
    assert_broken(&check(history.clone(), &in_archive(&[]), RULES), &[]);
    history.blows.clear();
    let both = Tables { left: vec![7], ..in_archive(&[7]) };
    assert_broken(&check(history.clone(), &both, RULES), &[("lost", 1), ("archive", 1)]);
    // Either, if nobody heard.
    history.acts[0].end = end(200, Us::MAX, Outcome::Unknown);
    history.acts[0].answer = Answer::Unknown;
    assert_broken(&check(history.clone(), &in_archive(&[]), RULES), &[]);
    assert_broken(&check(history, &in_archive(&[7]), RULES), &[]);
}

#[test]
fn torn_when_half_a_transaction_is_committed() {
    let unknown = |key| Sent {
        transaction: 7,
        end: end(5, Us::MAX, Outcome::Unknown),
        ..sent(key, PLAIN, Outcome::Unknown)
    };
    let mut history = good(7);
    history.sent = vec![unknown(7), unknown(8)];
    assert_broken(&judged(history.clone()), &[("torn", 1)]);
    let seen = |tables: Tables| check(history.clone(), &tables, RULES);
    assert_broken(&seen(Tables { ledger: vec![8], ..Tables::default() }), &[]);
    assert_broken(&seen(Tables { left: vec![8], ..Tables::default() }), &[]);
    // Of a block that was rolled back, or of another transaction.
    let mut history = good(7);
    history.sent = vec![unknown(7), Sent { transaction: 7, ..sent(8, PLAIN, Outcome::RolledBack) }];
    assert_clean(history.clone());
    history.sent = vec![unknown(7), Sent { transaction: 8, ..unknown(8) }];
    assert_clean(history.clone());
    // A failover that loses some may have undone what was done about the other.
    history.sent = vec![unknown(7), unknown(8)];
    history.blows = vec![failover(Some(9), 300, 400)];
    assert_clean(history.clone());
    history.blows = vec![failover(None, 300, 400)];
    assert_broken(&judged(history.clone()), &[("torn", 1)]);
    // Who reads his own has not committed.
    history.blows.clear();
    history.delivered[0].is_own = true;
    history.acts.clear();
    assert_clean(history);
}

#[test]
fn lease_id_when_two_messages_have_it() {
    let mut history = good(7);
    history.append(good(8));
    assert_broken(&judged(history.clone()), &[("lease-id", 1)]);
    history.delivered[1].lease_id = 2;
    history.acts[1].lease_id = 2;
    assert_clean(history);
}
