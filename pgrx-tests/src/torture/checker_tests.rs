//! The checker against histories made by hand: each rule broken once, and beside it what must not be held against
//! anybody.

use super::checker::{check, Rules, Tables, Verdict};
use super::history::{
    Act, Answer, Blow, BlowAt, Delivered, EffectRefused, End, History, Key, Outcome, Sent, Us, Verb,
};

pub(super) const EXACT: u8 = 0;
pub(super) const PLAIN: u8 = 1;
pub(super) const LEASE_US: Us = 1_000_000;
pub(super) const DURABLE: u8 = 2;
pub(super) const RULES: Rules = Rules {
    flush_us: 1_000_000,
    flush_slack_us: 500_000,
    clock_slack_us: 5_000,
    lease_us: LEASE_US,
    exact: EXACT,
    durable: DURABLE,
};

pub(super) fn end(open_us: Us, over_us: Us, outcome: Outcome) -> End {
    End { open_us, over_us, outcome }
}

/// Sent from 0 to 10.
pub(super) fn sent(key: Key, queue: u8, outcome: Outcome) -> Sent {
    Sent { key, queue, transaction: key, due_us: 0, end: end(0, 10, outcome) }
}

/// Read by a call of 10 us that committed.
pub(super) fn read(key: Key, lease_id: i64, began_us: Us) -> Delivered {
    Delivered {
        key,
        queue: PLAIN,
        is_own: false,
        lease_id,
        count: 1,
        lease_us: LEASE_US,
        began_us,
        returned_us: began_us + 10,
        end: end(began_us, began_us + 10, Outcome::Acknowledged),
    }
}

/// Done by a call of 10 us that committed.
pub(super) fn act(key: Key, lease_id: i64, verb: Verb, began_us: Us) -> Act {
    let end = end(began_us, began_us + 10, Outcome::Acknowledged);
    Act { key, lease_id, verb, answer: Answer::Done, began_us, returned_us: began_us + 10, end }
}

/// A message that was sent, read at 100 and finished at 200.
pub(super) fn good(key: Key) -> History {
    History {
        sent: vec![sent(key, PLAIN, Outcome::Acknowledged)],
        delivered: vec![read(key, 1, 100)],
        acts: vec![act(key, 1, Verb::Finish, 200)],
        ..History::default()
    }
}

/// A message that was sent and read at these times, under leases 1, 2, ..., and at last finished.
pub(super) fn read_at(times_us: &[Us]) -> History {
    let mut history = good(7);
    history.delivered = (1..).zip(times_us).map(|(lease_id, at_us)| read(7, lease_id, *at_us)).collect();
    let last_us = times_us.last().copied().unwrap_or_default();
    history.acts = vec![act(7, times_us.len() as i64, Verb::Finish, last_us + 100)];
    history
}

pub(super) fn crash(from_us: Us, to_us: Us) -> BlowAt {
    BlowAt { blow: Blow::Crash, from_us, to_us }
}

pub(super) fn failover(kept_until_us: Option<Us>, from_us: Us, to_us: Us) -> BlowAt {
    BlowAt { blow: Blow::Failover { kept_until_us }, from_us, to_us }
}

pub(super) fn judged(history: History) -> Verdict {
    check(history, &Tables::default(), RULES)
}

/// The rules that are broken, with how often.
#[track_caller]
pub(super) fn assert_broken(verdict: &Verdict, expected: &[(&str, u64)]) {
    let broken: Vec<(&str, u64)> =
        verdict.counts().iter().filter(|(_, c)| c.broken > 0).map(|(name, c)| (*name, c.broken)).collect();
    assert_eq!(broken, expected, "{verdict:?}");
}

#[track_caller]
pub(super) fn assert_clean(history: History) -> Verdict {
    let verdict = judged(history);
    assert_broken(&verdict, &[]);
    verdict
}

#[test]
fn good_history_is_clean_and_counted() {
    let mut history = good(7);
    let mut other = good(8);
    other.delivered[0].lease_id = 2;
    other.acts[0].lease_id = 2;
    history.append(other);
    history.sent.push(sent(9, PLAIN, Outcome::Unknown));
    history.sent.push(sent(10, PLAIN, Outcome::RolledBack));
    let verdict = assert_clean(history);
    assert_eq!((verdict.tried, verdict.acknowledged, verdict.unknown, verdict.rolled_back), (4, 2, 1, 1));
    assert_eq!((verdict.deliveries, verdict.finishes, verdict.unknown_delivered), (2, 2, 0));
}

#[test]
fn lost_when_never_delivered() {
    let history = History { sent: vec![sent(7, PLAIN, Outcome::Acknowledged)], ..History::default() };
    assert_broken(&judged(history), &[("lost", 1)]);
}

#[test]
fn lost_when_delivered_and_gone_unfinished() {
    let mut history = good(7);
    history.acts.clear();
    assert_broken(&judged(history.clone()), &[("lost", 1)]);
    // A finish that was refused or rolled back is none; one whose commit is unknown may be.
    history.acts = vec![Act { answer: Answer::Refused, ..act(7, 1, Verb::Finish, 200) }];
    assert_broken(&judged(history.clone()), &[("lost", 1), ("refused", 1)]);
    history.acts = vec![Act { end: end(205, 210, Outcome::RolledBack), ..act(7, 1, Verb::Finish, 200) }];
    assert_broken(&judged(history.clone()), &[("lost", 1)]);
    history.acts = vec![Act { end: end(205, Us::MAX, Outcome::Unknown), ..act(7, 1, Verb::Finish, 200) }];
    assert_clean(history);
}

#[test]
fn lost_when_left_in_its_table() {
    let tables = Tables { left: vec![7], ..Tables::default() };
    let history = History { sent: vec![sent(7, PLAIN, Outcome::Acknowledged)], ..History::default() };
    assert_broken(&check(history, &tables, RULES), &[("lost", 1)]);
}

#[test]
fn lost_in_asynchronous_failover_is_measured_and_otherwise_lost() {
    let mut history = History { sent: vec![sent(7, PLAIN, Outcome::Acknowledged)], ..History::default() };
    history.blows = vec![failover(Some(10), 50, 60)];
    assert_eq!(assert_clean(history.clone()).failover_lost, 1);
    history.blows = vec![failover(None, 50, 60)];
    assert_broken(&judged(history.clone()), &[("lost", 1)]);
    // The standby had it already.
    history.blows = vec![failover(Some(11), 50, 60)];
    assert_broken(&judged(history.clone()), &[("lost", 1)]);
    // Sent to the new server.
    history.blows = vec![failover(Some(0), 5, 9)];
    assert_broken(&judged(history), &[("lost", 1)]);
}

#[test]
fn phantom_when_nobody_sent_it() {
    let history = History { delivered: vec![read(7, 1, 100)], ..History::default() };
    assert_broken(&judged(history), &[("phantom", 1)]);
}

#[test]
fn phantom_when_rolled_back() {
    let mut history = good(7);
    history.sent = vec![sent(7, PLAIN, Outcome::RolledBack)];
    assert_broken(&judged(history.clone()), &[("phantom", 1)]);
    // The transaction that sent it may read it.
    history.delivered[0].is_own = true;
    assert_clean(history);
}

#[test]
fn phantom_when_delivered_before_its_commit_was_asked_for() {
    let mut history = good(7);
    history.sent[0].end = end(111, 120, Outcome::Acknowledged);
    assert_broken(&judged(history.clone()), &[("phantom", 1)]);
    history.sent[0].end = end(109, 300, Outcome::Acknowledged);
    assert_clean(history);
}

#[test]
fn early_when_before_its_time() {
    let mut history = read_at(&[100_000]);
    history.sent[0].due_us = 200_000;
    assert_broken(&judged(history.clone()), &[("early", 1)]);
    history.sent[0].due_us = 100_010;
    assert_clean(history);
}

#[test]
fn early_when_before_the_retry_is_due() {
    let mut history = read_at(&[100, 100_000]);
    history.acts.push(act(7, 1, Verb::Retry { delay_us: 300_000 }, 200));
    assert_broken(&judged(history.clone()), &[("early", 1)]);
    // An asynchronous failover may have undone it.
    history.blows = vec![failover(Some(210), 50_000, 60_000)];
    assert_clean(history.clone());
    history.blows = vec![failover(Some(211), 50_000, 60_000)];
    assert_broken(&judged(history.clone()), &[("early", 1)]);
    history.blows.clear();
    history.acts[1].verb = Verb::Retry { delay_us: 99_000 };
    assert_clean(history);
}

#[test]
fn doubled_when_delivered_after_its_finish() {
    let mut history = good(7);
    history.delivered.push(read(7, 2, 5_000_000));
    assert_broken(&judged(history.clone()), &[("doubled", 1)]);
    // A crash is no excuse: what is committed is committed.
    history.blows = vec![crash(1_000, 2_000)];
    assert_broken(&judged(history.clone()), &[("doubled", 1)]);
    history.blows = vec![failover(Some(210), 1_000, 2_000)];
    assert_eq!(assert_clean(history.clone()).failover_undone, 1);
    // The standby had the finish already.
    history.blows = vec![failover(Some(211), 1_000, 2_000)];
    assert_broken(&judged(history), &[("doubled", 1)]);
}

#[test]
fn doubled_when_twice_under_one_lease() {
    let mut history = good(7);
    history.delivered.push(read(7, 1, 105));
    assert_broken(&judged(history), &[("doubled", 1)]);
}

#[test]
fn doubled_when_twice_in_one_answer() {
    let mut history = read_at(&[100, 100]);
    history.delivered[0].end = end(110, 150, Outcome::RolledBack);
    assert_broken(&judged(history), &[("doubled", 1)]);
}

#[test]
fn concurrent_when_both_leases_run() {
    assert_broken(&judged(read_at(&[100, 500_000])), &[("doubled", 1), ("concurrent", 1)]);
    assert_clean(read_at(&[100, 100 + LEASE_US]));
    // The answer came late: the lease may have ended before.
    let mut history = read_at(&[100, 500_000]);
    history.delivered[1].returned_us = 100 + LEASE_US;
    history.acts[0] = act(7, 2, Verb::Finish, 1_200_000);
    assert_clean(history);
}

#[test]
fn concurrent_whatever_the_order_of_overlapping_reads() {
    let mut history = read_at(&[100, 105]);
    assert_broken(&judged(history.clone()), &[("doubled", 1), ("concurrent", 1)]);
    // If the second came first its transaction was rolled back before.
    history.delivered[1].end = end(115, 118, Outcome::RolledBack);
    history.delivered[0].returned_us = 120;
    history.delivered[0].end.over_us = 120;
    history.acts[0] = act(7, 1, Verb::Finish, 200);
    assert_clean(history);
}

#[test]
fn no_concurrent_when_given_back() {
    let spoil = |history: &mut History, act: Act| history.acts.push(act);
    for verb in [Verb::Retry { delay_us: 0 }, Verb::Release { delay_us: 0 }] {
        let mut history = read_at(&[100, 500_000]);
        spoil(&mut history, act(7, 1, verb, 300));
        assert_clean(history);
        // Refused, or rolled back, it gave nothing back.
        let mut history = read_at(&[100, 500_000]);
        spoil(&mut history, Act { answer: Answer::Refused, ..act(7, 1, verb, 300) });
        assert_broken(&judged(history), &[("doubled", 1), ("concurrent", 1), ("refused", 1)]);
        let mut history = read_at(&[100, 500_000]);
        spoil(&mut history, Act { end: end(305, 310, Outcome::RolledBack), ..act(7, 1, verb, 300) });
        assert_broken(&judged(history), &[("doubled", 1), ("concurrent", 1)]);
    }
}

#[test]
fn no_concurrent_after_a_read_that_rolled_back() {
    let mut history = read_at(&[100, 500_000]);
    history.delivered[0].end = end(400, 450, Outcome::RolledBack);
    assert_clean(history.clone());
    // But it held the message until then.
    history.delivered[0].end = end(600_000, 600_010, Outcome::RolledBack);
    assert_broken(&judged(history), &[("doubled", 1), ("concurrent", 1)]);
}

#[test]
fn concurrent_by_the_extended_lease() {
    let mut history = read_at(&[100, 1_500_000]);
    assert_clean(history.clone());
    history.acts.push(act(7, 1, Verb::Extend { lease_us: LEASE_US }, 900_000));
    assert_broken(&judged(history.clone()), &[("doubled", 1), ("concurrent", 1)]);
    // Nobody knows whether it was extended.
    history.acts[1].answer = Answer::Unknown;
    assert_clean(history);
}

#[test]
fn concurrent_while_a_finish_waits_for_its_commit() {
    // In time, and then the transaction stays open for longer than the lease.
    let mut history = read_at(&[100, 1_500_000]);
    history
        .acts
        .push(Act { end: end(2_000_000, 2_000_010, Outcome::RolledBack), ..act(7, 1, Verb::Finish, 300) });
    assert_broken(&judged(history), &[("doubled", 1), ("concurrent", 1)]);
}

#[test]
fn young_lease_may_be_forgotten_by_a_crash_and_an_old_one_not() {
    let with_lease_of_10_s = |crash_us: Us| {
        let mut history = read_at(&[100, 5_000_000]);
        history.delivered[0].lease_us = 10_000_000;
        history.blows = vec![crash(crash_us, crash_us + 1_000)];
        history
    };
    assert_eq!(assert_clean(with_lease_of_10_s(500_000)).forgotten_young, 1);
    // A little older: the worker may not have written it yet.
    assert_eq!(assert_clean(with_lease_of_10_s(1_200_000)).forgotten_unsure, 1);
    assert_broken(&judged(with_lease_of_10_s(2_000_000)), &[("doubled", 1), ("concurrent", 1)]);
    let mut history = with_lease_of_10_s(2_000_000);
    history.blows.push(BlowAt { blow: Blow::WorkerAway, from_us: 900_000, to_us: 1_900_000 });
    assert_eq!(assert_clean(history).forgotten_unsure, 1);
    // That it went with the crash, or a moment before, excuses nothing.
    let mut history = with_lease_of_10_s(2_000_000);
    history.blows.push(BlowAt { blow: Blow::WorkerAway, from_us: 1_900_000, to_us: 3_000_000 });
    assert_broken(&judged(history), &[("doubled", 1), ("concurrent", 1)]);
    // Of an asynchronous failover it counts what the standby had.
    let mut history = with_lease_of_10_s(2_000_000);
    history.blows = vec![failover(Some(1_200_000), 2_000_000, 2_001_000)];
    assert_eq!(assert_clean(history.clone()).forgotten_unsure, 1);
    history.blows = vec![failover(Some(1_700_000), 2_000_000, 2_001_000)];
    assert_broken(&judged(history), &[("doubled", 1), ("concurrent", 1)]);
    // A crash after both leases were given excuses nothing.
    let verdict = judged(with_lease_of_10_s(6_000_000));
    assert_broken(&verdict, &[("doubled", 1), ("concurrent", 1)]);
}

#[test]
fn leases_that_no_crash_might_forget_are_counted() {
    let mut history = read_at(&[100]);
    history.delivered[0].lease_us = 10_000_000;
    history.acts[0] = act(7, 1, Verb::Finish, 6_000_000);
    history.blows = vec![crash(2_000_000, 2_001_000)];
    assert_eq!(assert_clean(history.clone()).outlived, 1);
    history.blows = vec![crash(500_000, 501_000), crash(2_000_000, 2_001_000)];
    assert_eq!(assert_clean(history).outlived, 0);
}

#[test]
fn fence_when_finished_after_the_lease_ended() {
    let mut history = read_at(&[100]);
    history.acts = vec![act(7, 1, Verb::Finish, 200 + LEASE_US + 10_000)];
    assert_broken(&judged(history.clone()), &[("fence", 1)]);
    // Extended in time.
    history.acts.push(act(7, 1, Verb::Extend { lease_us: LEASE_US }, 900_000));
    assert_clean(history);
}

#[test]
fn fence_when_another_has_it() {
    let mut history = read_at(&[100, 500_000]);
    history.acts = vec![
        act(7, 1, Verb::Retry { delay_us: 0 }, 200),
        act(7, 1, Verb::Extend { lease_us: LEASE_US }, 600_000),
        act(7, 2, Verb::Finish, 700_000),
    ];
    assert_broken(&judged(history.clone()), &[("fence", 1)]);
    history.acts[1].answer = Answer::Refused;
    assert_clean(history);
}

#[test]
fn fence_when_it_was_given_back() {
    let mut history = read_at(&[100]);
    history.acts = vec![act(7, 1, Verb::Release { delay_us: 0 }, 200), act(7, 1, Verb::Finish, 300)];
    assert_broken(&judged(history), &[("fence", 1)]);
}

#[test]
fn effect_when_the_ledger_differs() {
    let mut history = good(7);
    history.sent[0].queue = EXACT;
    let ledger = |keys: &[Key]| Tables { ledger: keys.to_vec(), ..Tables::default() };
    assert_broken(&check(history.clone(), &ledger(&[7]), RULES), &[]);
    assert_broken(&check(history.clone(), &ledger(&[]), RULES), &[("effect", 1)]);
    assert_broken(&check(history.clone(), &ledger(&[7, 8]), RULES), &[("effect", 1)]);
    let refused = EffectRefused { key: 7, lease_id: Some(1), began_us: 250, at_us: 300 };
    history.refused = vec![refused];
    assert_broken(&check(history.clone(), &ledger(&[7]), RULES), &[("effect", 1)]);
    // Its lease had ended: another may have done it.
    history.refused = vec![EffectRefused { at_us: 100 + LEASE_US, ..refused }];
    assert_broken(&check(history.clone(), &ledger(&[7]), RULES), &[]);
    history.refused = vec![EffectRefused { lease_id: None, at_us: 100 + LEASE_US, ..refused }];
    assert_broken(&check(history.clone(), &ledger(&[7]), RULES), &[("effect", 1)]);
    // What the call itself had taken may have ended in it.
    history.refused = vec![EffectRefused { lease_id: None, at_us: 250 + LEASE_US, ..refused }];
    assert_broken(&check(history.clone(), &ledger(&[7]), RULES), &[]);
    history.refused.clear();
    history.delivered.clear();
    history.acts.clear();
    history.sent[0].end.outcome = Outcome::RolledBack;
    assert_broken(&check(history, &ledger(&[7]), RULES), &[("effect", 1)]);
}

#[test]
fn effect_when_the_ledger_has_a_lease_that_nobody_read() {
    let tables = |lease_id| Tables { claimed: vec![(7, lease_id)], ..Tables::default() };
    assert_broken(&check(good(7), &tables(1), RULES), &[]);
    assert_broken(&check(good(7), &tables(2), RULES), &[("effect", 1)]);
}

#[test]
fn count_when_a_durable_lease_was_not_counted() {
    let mut history = read_at(&[100, 5_000_000]);
    assert_clean(history.clone());
    history.delivered.iter_mut().for_each(|one| one.queue = DURABLE);
    assert_broken(&judged(history.clone()), &[("count", 1)]);
    history.delivered[1].count = 2;
    assert_clean(history.clone());
    history.delivered[1].count = 1;
    // Only a failover between the two may have undone the first.
    history.blows = vec![failover(Some(0), 50, 60), failover(Some(0), 6_000_000, 6_000_010)];
    assert_broken(&judged(history.clone()), &[("count", 1)]);
    history.blows = vec![failover(Some(111), 300, 400)];
    assert_broken(&judged(history.clone()), &[("count", 1)]);
    history.blows = vec![failover(Some(110), 300, 400)];
    assert_clean(history.clone());
    history.blows.clear();
    history.acts.push(act(7, 1, Verb::Release { delay_us: 0 }, 300));
    assert_clean(history);
}
