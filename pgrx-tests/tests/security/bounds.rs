//! Every argument of every function at its bounds, past them, null, not a number, infinite, of the wrong shape: the
//! right SQLSTATE and nothing changed, or taken as it is. And rows with extreme values that plain SQL wrote.

use super::*;
use queue_tests::wait_until;

/// Calls that must fail, and with what. Queue `q` has the messages 1 to 3, the third leased.
const REFUSED: &[(&str, &[&str])] = &[
    (
        "22023",
        &[
            // queue_create and queue_alter share their checks; each is asked.
            "queue_create('n', visibility_timeout => '999 us')",
            "queue_create('n', visibility_timeout => '0')",
            "queue_create('n', visibility_timeout => '-1 s')",
            "queue_create('n', visibility_timeout => '365 days 1 us')",
            "queue_create('n', visibility_timeout => '1 month')",
            "queue_create('n', visibility_timeout => '-1 year')",
            "queue_create('n', visibility_timeout => '2147483647 days 2562047788 h')",
            "queue_create('n', max_deliveries => -1)",
            "queue_create('n', max_deliveries => 1000001)",
            "queue_create('n', max_deliveries => 9223372036854775807)",
            "queue_create('n', max_deliveries => -9223372036854775808)",
            "queue_create('n', retry_delay => '-1 us')",
            "queue_create('n', retry_delay => '3650 days 1 us')",
            "queue_create('n', retry_backoff => 'NaN')",
            "queue_create('n', retry_backoff => 'Infinity')",
            "queue_create('n', retry_backoff => '-Infinity')",
            "queue_create('n', retry_backoff => 0.999999)",
            "queue_create('n', retry_backoff => -1)",
            "queue_create('n', retry_backoff => 1000.0000001)",
            "queue_create('n', retry_backoff => 1e308)",
            "queue_create('n', retry_delay_max => '-1 us')",
            "queue_create('n', retry_delay_max => '3650 days 1 us')",
            "queue_create('n', retry_jitter => 'NaN')",
            "queue_create('n', retry_jitter => -1e-300)",
            "queue_create('n', retry_jitter => 1.0000001)",
            "queue_create('n', message_ttl => '-1 us')",
            "queue_create('n', message_ttl => '3650 days 1 us')",
            "queue_create('n', message_ttl => '1 mon')",
            "queue_create('n', archive_retention => '-1 us')",
            "queue_create('n', archive_retention => '36500 days 1 us')",
            "queue_alter('q', visibility_timeout => '999 us')",
            "queue_alter('q', max_deliveries => 1000001)",
            "queue_alter('q', retry_delay => '-1 us')",
            "queue_alter('q', retry_delay => '3650 days 1 us')",
            "queue_alter('q', retry_delay_max => '-1 us')",
            "queue_alter('q', retry_delay_max => '3650 days 1 us')",
            "queue_alter('q', retry_backoff => 'NaN')",
            "queue_alter('q', retry_jitter => 'Infinity')",
            "queue_alter('q', message_ttl => '-1 us')",
            "queue_alter('q', archive_retention => '1 century')",
            "queue_alter('q', dead_letter_queue => 'q')",
            "queue_send('q', '1', delay => '-1 us')",
            "queue_send('q', '1', delay => '3650 days 1 us')",
            "queue_send('q', '1', delay => '1 mon')",
            "queue_send('q', '1', delay => '2147483647 days')",
            "queue_send('q', '1', delay => '-2147483648 days')",
            "queue_send('q', '1', delay => '0', deliver_at => now())",
            "queue_send('q', '1', deliver_at => 'infinity')",
            "queue_send('q', '1', deliver_at => '-infinity')",
            "queue_send('q', '1', ttl => '-1 us')",
            "queue_send('q', '1', ttl => '3650 days 1 us')",
            "queue_send('q', '1', ttl => '1 year')",
            "queue_send_batch('q', array[['1','2'],['3','4']]::jsonb[])",
            "queue_send_batch('q', array[[['1']]]::jsonb[])",
            "queue_send_batch('q', array_fill('1'::jsonb, array[100001]))",
            "queue_send_batch('q', '{1,2}', '{1}')",
            "queue_send_batch('q', '{1}', array[['1','2']]::jsonb[])",
            "queue_send_batch('q', '{}', '{1}')",
            "queue_send_batch('q', '{1}', delay => '-1 us')",
            "queue_send_batch('q', '{1}', delay => '3650 days 1 us')",
            "queue_send_batch('q', '{1}', delay => '0', deliver_at => now())",
            "queue_send_batch('q', '{1}', deliver_at => 'infinity')",
            "queue_send_batch('q', '{1}', deliver_at => '-infinity')",
            "queue_send_batch('q', '{1}', ttl => '-1 us')",
            "queue_send_batch('q', '{1}', ttl => '3650 days 1 us')",
            "queue_send_batch('q', '{1}', ttl => '1 mon')",
            "queue_send_entries('q', '{}')",
            "queue_send_entries('q', 'null')",
            "queue_send_entries('q', '1')",
            "queue_send_entries('q', '[1]')",
            "queue_send_entries('q', '[[]]')",
            "queue_send_entries('q', '[{}]')",
            "queue_send_entries('q', '[{\"message\": 1, \"delay\": 5}]')",
            "queue_send_entries('q', '[{\"message\": 1, \"delay\": \"-1 s\"}]')",
            "queue_send_entries('q', '[{\"message\": 1, \"deliver_at\": \"infinity\"}]')",
            "queue_send_entries('q', '[{\"message\": 1, \"ttl\": \"1 mon\"}]')",
            "queue_send_entries('q', '[{\"message\": 1, \"priority\": 1.5}]')",
            "queue_send_entries('q', '[{\"message\": 1, \"msg_id\": 7}]')",
            "queue_send_entries('q', (SELECT jsonb_agg(jsonb_build_object('message', 1)) FROM generate_series(1, 100001)))",
            "queue_read('q', 0)",
            "queue_read('q', -1)",
            "queue_read('q', 100001)",
            "queue_read('q', 9223372036854775807)",
            "queue_read('q', -9223372036854775808)",
            "queue_read('q', visibility_timeout => '0')",
            "queue_read('q', visibility_timeout => '365 days 1 us')",
            "queue_read('q', wait => '-1 us')",
            "queue_read('q', wait => '1 day 1 us')",
            "queue_read('q', wait => '1 mon')",
            "queue_read_any('{}')",
            "queue_read_any(array_fill('q'::text, array[65]) || (SELECT array_agg('q' || n) FROM generate_series(1, 65) n))",
            "queue_read_any(array[['q','q'],['q','q']])",
            "queue_read_any('{q}', 0)",
            "queue_read_any((SELECT array_agg('q' || n) FROM generate_series(1, 65) n))",
            "queue_read_any('{q}', -1)",
            "queue_read_any('{q}', 100001)",
            "queue_read_any('{q}', visibility_timeout => '0')",
            "queue_read_any('{q}', visibility_timeout => '365 days 1 us')",
            "queue_read_any('{q}', wait => '1 day 1 us')",
            "queue_read_any('{q}', wait => '1 mon')",
            "queue_read_any('{q}', wait => '-1 us')",
            "queue_pop('q', 0)",
            "queue_pop('q', -1)",
            "queue_pop('q', 100001)",
            "queue_delete_batch('q', array[[1,2],[3,4]]::bigint[])",
            "queue_delete_batch('q', array_fill(1::bigint, array[100001]))",
            "queue_delete_batch('q', '{1,2}', '{1}')",
            "queue_archive_batch('q', array[[1]]::bigint[] || array[[2]]::bigint[])",
            "queue_archive_batch('q', array_fill(1::bigint, array[100001]))",
            "queue_archive_batch('q', '{1}', '{1,2}')",
            "queue_delete_and_read('q', '{1}', '{1,2}')",
            "queue_delete_and_read('q', '{1}', quantity => 0)",
            "queue_delete_and_read('q', '{1}', visibility_timeout => '0')",
            "queue_delete_and_read('q', '{1}', quantity => -1)",
            "queue_delete_and_read('q', '{1}', quantity => 100001)",
            "queue_delete_and_read('q', '{1}', visibility_timeout => '365 days 1 us')",
            "queue_delete_and_read('q', '{1}', visibility_timeout => '1 mon')",
            "queue_delete_and_read('q', array_fill(1::bigint, array[100001]))",
            "queue_retry('q', 3, delay => '-1 us')",
            "queue_retry('q', 3, delay => '3650 days 1 us')",
            "queue_retry('q', 3, delay => '1 mon')",
            "queue_release('q', '{3}', delay => '-1 us')",
            "queue_release('q', '{3}', delay => '3650 days 1 us')",
            "queue_release('q', '{3}', delay => '1 mon')",
            "queue_release('q', array_fill(1::bigint, array[100001]))",
            "queue_release('q', '{3}', '{1,2}')",
            "queue_extend('q', 3, visibility_timeout => '0')",
            "queue_extend('q', 3, visibility_timeout => '365 days 1 us')",
            "queue_extend_batch('q', array[[3,3],[3,3]]::bigint[])",
            "queue_extend_batch('q', array_fill(1::bigint, array[100001]))",
            "queue_extend_batch('q', '{3}', '{1,2}')",
            "queue_extend_batch('q', '{3}', visibility_timeout => '0')",
            "queue_extend_batch('q', '{3}', visibility_timeout => '365 days 1 us')",
            "queue_extend_batch('q', '{3}', visibility_timeout => '1 mon')",
            "queue_peek('q', 0)",
            "queue_peek('q', 100001)",
            "queue_peek('q', state => '')",
            "queue_peek('q', state => 'READY')",
            "queue_peek('q', msg_ids => array[[1,2],[3,4]]::bigint[])",
            "queue_peek('q', msg_ids => array_fill(1::bigint, array[100001]))",
            "queue_redrive('q', 0)",
            "queue_redrive('q', -1)",
            "queue_redrive('q', target => 'q')",
            "queue_redrive('q', msg_ids => array_fill(1::bigint, array[100001]))",
            "queue_unarchive('q', 0)",
            "queue_unarchive('q', -9223372036854775808)",
            "queue_unarchive('q', msg_ids => array_fill(1::bigint, array[100001]))",
            "queue_schedule('q', '', '1 h', '1')",
            "queue_schedule('q', repeat('x', 201), '1 h', '1')",
            "queue_schedule('q', 'n', '', '1')",
            "queue_schedule('q', 'n', '999 ms', '1')",
            "queue_schedule('q', 'n', '-1 h', '1')",
            "queue_schedule('q', 'n', '3650 days 1 us', '1')",
            "queue_schedule('q', 'n', '1 mon', '1')",
            "queue_schedule('q', 'n', '* * * *', '1')",
            "queue_schedule('q', 'n', '* * * * * * *', '1')",
            "queue_schedule('q', 'n', '60 * * * *', '1')",
            "queue_schedule('q', 'n', '-1 * * * *', '1')",
            "queue_schedule('q', 'n', '99999999999999999999 * * * *', '1')",
            "queue_schedule('q', 'n', '*/0 * * * *', '1')",
            "queue_schedule('q', 'n', '0 0 31 2 *', '1')",
            "queue_schedule('q', 'n', repeat('1,', 500) || '1 * * * *', '1')",
            "queue_schedule('q', 'n', '1 h', '1', '[]')",
            "queue_schedule('q', 'n', '1 h', '1', timezone => '')",
            "queue_schedule('q', 'n', '1 h', '1', timezone => '../../etc/passwd')",
            "queue_schedule('q', 'n', '1 h', '1', timezone => repeat('x', 100000))",
            "queue_grant('q', 'public', '')",
            "queue_grant('q', 'public', repeat('x', 100000))",
        ],
    ),
    (
        "22004",
        &[
            "queue_create(NULL)",
            "queue_alter(NULL)",
            "queue_drop(NULL)",
            "queue_purge(NULL)",
            "queue_pause(NULL)",
            "queue_resume(NULL)",
            "queue_grant(NULL, 'public', 'send')",
            "queue_grant('q', NULL, 'send')",
            "queue_revoke('q', 'public', NULL)",
            "queue_send(NULL, '1')",
            "queue_send('q', NULL)",
            "queue_send_batch(NULL, '{1}')",
            "queue_send_batch('q', NULL)",
            "queue_send_batch('q', '{1,NULL}')",
            "queue_send_entries(NULL, '[]')",
            "queue_send_entries('q', NULL)",
            "queue_read(NULL)",
            "queue_read_any(NULL)",
            "queue_read_any('{q,NULL}')",
            "queue_pop(NULL)",
            "queue_delete(NULL, 1)",
            "queue_delete('q', NULL)",
            "queue_delete_batch('q', NULL)",
            "queue_delete_batch('q', '{NULL}')",
            "queue_delete_batch('q', '{1}', '{NULL}')",
            "queue_archive('q', NULL)",
            "queue_archive_batch('q', '{1,NULL}')",
            "queue_delete_and_read('q', NULL)",
            "queue_retry('q', NULL)",
            "queue_reject('q', NULL)",
            "queue_release('q', NULL)",
            "queue_release('q', '{NULL}')",
            "queue_extend('q', NULL)",
            "queue_extend_batch('q', '{NULL}')",
            "queue_cancel('q', NULL)",
            "queue_peek(NULL)",
            "queue_peek('q', msg_ids => '{NULL}')",
            "queue_redrive(NULL)",
            "queue_redrive('q', msg_ids => '{NULL}')",
            "queue_unarchive(NULL)",
            "queue_unarchive('q', msg_ids => '{1,NULL}')",
            "queue_schedule('q', NULL, '1 h', '1')",
            "queue_schedule('q', 'n', NULL, '1')",
            "queue_schedule('q', 'n', '1 h', NULL)",
            "queue_unschedule('q', NULL)",
            "queue_schedule_pause(NULL, 's')",
            "queue_revoke(NULL, 'public', 'send')",
            "queue_delete_batch(NULL, '{1}')",
            "queue_archive(NULL, 1)",
            "queue_archive_batch(NULL, '{1}')",
            "queue_delete_and_read(NULL, '{1}')",
            "queue_retry(NULL, 1)",
            "queue_reject(NULL, 1)",
            "queue_release(NULL, '{1}')",
            "queue_extend(NULL, 1)",
            "queue_extend_batch(NULL, '{1}')",
            "queue_cancel(NULL, 1)",
            "queue_schedule(NULL, 'n', '1 h', '1')",
            "queue_unschedule(NULL, 's')",
            "queue_schedule_pause('q', NULL)",
        ],
    ),
    (
        "0A000",
        &[
            "queue_send('q', '1', priority => 1)",
            "queue_send('q', '1', priority => -9223372036854775808)",
            "queue_send('q', '1', group_key => '')",
            "queue_send('q', '1', dedup_key => 'k')",
            "queue_send_batch('q', '{1}', group_keys => '{g}')",
            "queue_send_entries('q', '[{\"message\": 1, \"group_key\": \"g\"}]')",
            "queue_read('q', filter => '{}')",
            "queue_read('q', consumer => '')",
            "queue_create('n', max_length => 1)",
            "queue_create('n', overflow => 'drop')",
            "queue_create('n', dedup_window => '1 h')",
            "queue_create('n', priority_ageing => '1 us')",
            "queue_create('n', group_fairness => true)",
        ],
    ),
    ("22007", &["queue_schedule('q', 'n', 'an hour', '1')", "queue_send_entries('q', '[{\"message\": 1, \"delay\": \"soon\"}]')"]),
    ("22P02", &["queue_send('q', '{')", "queue_delete_batch('q', '{x}')"]),
];

/// Values at their bounds, that are taken.
const TAKEN: &[&str] = &[
    "queue_create('a', '1 ms', 0, '', '0', 1, '0', 0, '0', '0')",
    "queue_create('b', '365 days', 1000000, '', '3650 days', 1000, '3650 days', 1, '3650 days', '36500 days')",
    "queue_create('c', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)",
    "queue_create('d', '364 days 24 h', retry_backoff => 1.0000000000000002, retry_jitter => 5e-324)",
    "queue_alter('a', '365 days', 1000000, '', '3650 days', 1000, '3650 days', 1, '3650 days', '36500 days')",
    "queue_alter('a')",
    "queue_send('a', 'null')",
    "queue_send('a', '1', 'null', ttl => '0')",
    "queue_send('a', '1', '[1]', '0')",
    "queue_send('a', '1', '\"text\"', '3650 days', ttl => '3650 days')",
    "queue_send('a', '1', deliver_at => '4713-01-01 00:00:00+00 BC')",
    "queue_send('a', '1', deliver_at => '294276-12-31 23:59:59.999999+00', ttl => '1 day')",
    "queue_send('a', '1', deliver_at => '294276-12-31 23:59:59.999999+00', ttl => '3650 days')",
    "queue_send('a', to_jsonb(repeat('x', 10000000)))",
    "queue_send('a', (repeat('[', 1000) || repeat(']', 1000))::jsonb)",
    "queue_send('a', '1e100000')",
    "queue_send('a', '\"\\u0001\\ud83d\\ude00\"')",
    "queue_send_batch('a', '{}')",
    "queue_send_batch('a', '[5:7]={1,2,3}', '[-1:1]={NULL,2,NULL}')",
    "queue_send_entries('a', '[]')",
    "queue_send_entries('a', '[{\"message\": null, \"headers\": null, \"delay\": null, \"ttl\": null, \"priority\": 0}]')",
    "queue_read('a', 100000, '1 ms')",
    "queue_read('a', 1, '365 days', '0')",
    "queue_read('a', NULL, NULL, NULL, NULL, NULL)",
    "queue_read_any('[7:7]={a}')",
    "queue_read_any(array_fill('a'::text, array[65]))",
    "generate_series(1, 64) n, queue_create('any' || n)",
    "queue_read_any((SELECT array_agg('any' || n) FROM generate_series(1, 64) n), 100000, '365 days', '0')",
    "queue_pop('b', 100000)",
    "queue_delete('a', 9223372036854775807)",
    "queue_delete('a', -9223372036854775808, -9223372036854775808)",
    "queue_delete_batch('a', '{}')",
    "queue_delete_batch('a', '{}', '{}')",
    "queue_delete_batch('a', '[0:1]={5,5}')",
    "queue_delete_batch('a', (SELECT array_agg(n + 1000000) FROM generate_series(1, 100000) n))",
    "queue_delete_and_read('a', '{}', '{}', 100000)",
    "queue_retry('a', 1, error => repeat('é', 6000), delay => '3650 days')",
    "queue_reject('a', 2, error => '')",
    "queue_release('a', '{}', '{}', '3650 days')",
    "queue_extend('a', 0, 0, '365 days')",
    "queue_extend_batch('a', '[9:10]={1,2}')",
    "queue_cancel('a', 0)",
    "queue_peek('a', 100000, '{}', 'exhausted')",
    "queue_peek('a', NULL, NULL, NULL)",
    "queue_redrive('a', 9223372036854775807, msg_ids => '{}')",
    "queue_unarchive('a', 9223372036854775807, '', '{-1}')",
    "queue_schedule('a', repeat('x', 200), '1 s', 'null')",
    "queue_schedule('a', 'n', '3650 days', '1')",
    "queue_schedule('a', 'n', '* * * * * *', '1', '{}', 'Europe/Berlin')",
    "queue_schedule_pause('a', 'n', NULL)",
];

/// From 17 on intervals can be infinite.
const INFINITE: &[&str] = &[
    "queue_create('n', visibility_timeout => '$')",
    "queue_create('n', retry_delay => '$')",
    "queue_create('n', retry_delay_max => '$')",
    "queue_create('n', message_ttl => '$')",
    "queue_create('n', archive_retention => '$')",
    "queue_alter('q', archive_retention => '$')",
    "queue_send('q', '1', delay => '$')",
    "queue_send('q', '1', ttl => '$')",
    "queue_alter('q', retry_delay => '$')",
    "queue_alter('q', retry_delay_max => '$')",
    "queue_send_batch('q', '{1}', delay => '$')",
    "queue_send_batch('q', '{1}', ttl => '$')",
    "queue_send_entries('q', '[{\"message\": 1, \"delay\": \"$\"}]')",
    "queue_read('q', visibility_timeout => '$')",
    "queue_read('q', wait => '$')",
    "queue_read_any('{q}', wait => '$')",
    "queue_read_any('{q}', visibility_timeout => '$')",
    "queue_delete_and_read('q', '{}', visibility_timeout => '$')",
    "queue_retry('q', 3, delay => '$')",
    "queue_release('q', '{3}', delay => '$')",
    "queue_extend('q', 3, visibility_timeout => '$')",
    "queue_extend_batch('q', '{3}', visibility_timeout => '$')",
    "queue_schedule('q', 'n', '$', '1')",
];

#[test]
fn arguments_out_of_bounds_are_refused_and_change_nothing() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    send_many(&mut client, "q", 3);
    client.batch_execute("UPDATE queue.q SET visible_at = now() + interval '1 h' WHERE msg_id < 3").unwrap();
    assert_eq!(ids(&read_for(&mut client, "q", 3, "1 h")), [3]);
    wait_written(&mut client, "q", &[3]);
    let before = picture(&mut client);
    for (code, calls) in REFUSED {
        for call in *calls {
            let result = client.batch_execute(&format!("SELECT * FROM {call}"));
            assert!(result.is_err(), "{call}");
            assert_eq!(common::code(result), *code, "{call}");
        }
    }
    if number(&mut client, "current_setting('server_version_num')") >= 170_000 {
        for call in
            INFINITE.iter().flat_map(|call| ["infinity", "-infinity"].map(|word| call.replace('$', word)))
        {
            assert_eq!(code(client.batch_execute(&format!("SELECT * FROM {call}"))), "22023", "{call}");
        }
        assert_eq!(code(client.batch_execute("CALL queue_wait('{q}', 'infinity')")), "22023");
    }
    for (code, call) in [
        ("22004", "queue_wait(NULL, '0')"),
        ("22004", "queue_wait('{q}', NULL)"),
        ("22023", "queue_wait('{}', '0')"),
        ("22023", "queue_wait('{q}', '-1 us')"),
        ("22023", "queue_wait('{q}', '1 day 1 us')"),
        ("22023", "queue_wait('{q}', '1 mon')"),
        (
            "22023",
            &format!(
                "queue_wait('{{{}}}', '0')",
                (1..=65).map(|n| n.to_string()).collect::<Vec<_>>().join(",")
            ),
        ),
        ("42704", "queue_wait('{none}', '0')"),
    ] {
        let result = client.batch_execute(&format!("CALL {call}"));
        assert!(result.is_err(), "{call}");
        assert_eq!(common::code(result), code, "{call}");
    }
    assert_eq!(picture(&mut client), before);
}

/// A hundred thousand names compared with each other took 17 s, which nothing could interrupt.
#[test]
fn list_of_far_too_many_queues_is_refused_at_once() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let names = "(SELECT array_agg('name ' || n) FROM generate_series(1, 100000) n)";
    let begun = std::time::Instant::now();
    assert_eq!(code(client.batch_execute(&format!("SELECT * FROM queue_read_any({names})"))), "22023");
    assert!(begun.elapsed() < std::time::Duration::from_secs(12), "{:?}", begun.elapsed());
    let many = "(SELECT array_agg('q'::text) FROM generate_series(1, 100000) n)";
    client.batch_execute(&format!("SELECT * FROM queue_read_any({many})")).unwrap();
}

#[test]
fn arguments_at_their_bounds_are_taken_and_can_be_dumped() {
    let database = database_with(&[]);
    let mut client = session(&database);
    for call in TAKEN {
        let result = client.batch_execute(&format!("SELECT * FROM {call}"));
        assert!(result.is_ok(), "{call}: {result:?}");
    }
    // Whatever was written reads as text and back: a dump of it can be restored.
    client
        .batch_execute(
            "DO $$ DECLARE r record; BEGIN
               FOR r IN SELECT m, m::text AS t FROM queue.a m LOOP
                 ASSERT r.t::queue.a = r.m;
               END LOOP;
             END $$",
        )
        .unwrap();
    let expiring = "SELECT count(*) FROM queue.a WHERE visible_at > '294276-01-01' AND expires_at IS NULL";
    assert_eq!(number(&mut client, expiring), 2, "what would expire after the end of time does not");
    assert_eq!(number(&mut client, "SELECT count(*) FROM queue.a WHERE octet_length(last_error) = 10000"), 1);
}

/// What one who may only INSERT can write: every column at its ends. The server lives, others' messages go on.
#[test]
fn rows_with_extreme_values_break_nothing() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let sender = make_role(&mut client, &database, "sender");
    client.batch_execute(&format!("SELECT queue_grant('q', '{sender}', 'send'); SET ROLE {sender}")).unwrap();
    let ids = ["-9223372036854775808", "-1", "0", "9223372036854775807"];
    let times = [
        "'-infinity'",
        "'infinity'",
        "'4713-01-01 00:00:00+00 BC'",
        "'294276-12-31 23:59:59.999999+00'",
        "NULL",
    ];
    let counts = ["-2147483648", "-1", "0", "2147483647"];
    let postmaster = database.cluster.postmaster_pid().unwrap();
    let pid = client.pid();
    for (i, visible) in times.iter().enumerate() {
        for expires in times {
            client
                .batch_execute(&format!(
                    "INSERT INTO queue.q (msg_id, enqueued_at, visible_at, delivery_count, priority, expires_at, message)
                     SELECT id, {visible}, {visible}, count, priority, {expires}, '\"extreme\"' FROM
                     unnest('{{{}}}'::bigint[], '{{{}}}'::int[], '{{-32768,-1,0,32767}}'::int2[]) AS x (id, count, priority)",
                    ids.join(","),
                    counts.join(","),
                    visible = if i == 4 && visible == &"NULL" { "'epoch'" } else { visible },
                ))
                .unwrap();
            client.batch_execute("RESET ROLE").unwrap();
            for call in [
                "queue_peek('q', 1000)",
                "queue_read('q', 2)",
                "queue_read('q', 1000, '365 days')",
                "queue_extend_batch('q', '{-9223372036854775808,-1,0,9223372036854775807}', visibility_timeout => '1 ms')",
                "queue_retry('q', -9223372036854775808)",
                "queue_retry('q', 9223372036854775807, delay => '0')",
                "queue_release('q', '{-1,0}', delay => '1 ms')",
                "queue_peek('q', 1000)",
                "queue_archive('q', -1)",
                "queue_reject('q', 0)",
                "queue_health()",
                "queue_unarchive('q')",
                "queue_pop('q', 1000)",
                "queue_send('q', '1')",
                "queue_purge('q')",
            ] {
                let result = client.batch_execute(&format!("SELECT * FROM {call}"));
                assert!(result.is_ok(), "{visible}, {expires}: {call}: {result:?}");
            }
            client.batch_execute(&format!("SET ROLE {sender}")).unwrap();
        }
    }
    client.batch_execute("RESET ROLE").unwrap();
    assert_eq!(database.cluster.postmaster_pid().unwrap(), postmaster);
    assert_eq!(number(&mut client, "pg_backend_pid()"), i64::from(pid), "no crash in between");
    client.batch_execute("SELECT queue_create('other')").unwrap();
    let sent = send(&mut client, "other", 1);
    assert_eq!(drain(&mut client, "other"), [sent]);
    // The highest id of all is delivered like any other, whether it is met by a load or published.
    for _ in 0..2 {
        client
            .batch_execute(&format!("INSERT INTO queue.other (msg_id, message) VALUES ({}, '1')", i64::MAX))
            .unwrap();
        assert_eq!(drain(&mut client, "other"), [i64::MAX]);
    }
    // A message that has expired since the beginning of time does expire.
    client.batch_execute("INSERT INTO queue.other (message, expires_at) VALUES ('1', '-infinity')").unwrap();
    wait_until("it is gone", || rows(&mut client, "other") == 0);
}

/// The dispatcher's trigger may be put on any table: on one that is no queue it says so or does nothing.
#[test]
fn trigger_of_ours_on_a_table_of_somebody_elses_changes_no_queue() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    let role = make_role(&mut client, &database, "forger");
    let sent = send_many(&mut client, "q", 3);
    assert_eq!(ids(&read_for(&mut client, "q", 1, "1 h")), sent[..1]);
    wait_written(&mut client, "q", &sent[..1]);
    let before = picture(&mut client);
    client
        .batch_execute(&format!(
            "CREATE SCHEMA forged AUTHORIZATION {role}; CREATE TABLE forged.q (LIKE queue.q INCLUDING ALL);
             ALTER TABLE forged.q OWNER TO {role}; SET ROLE {role};
             CREATE TRIGGER a AFTER INSERT OR UPDATE ON forged.q FOR EACH ROW EXECUTE FUNCTION queue.on_change();
             CREATE TRIGGER c AFTER TRUNCATE ON forged.q EXECUTE FUNCTION queue.on_change();
             CREATE TABLE forged.narrow (msg_id bigint);
             CREATE TRIGGER a AFTER INSERT ON forged.narrow FOR EACH ROW EXECUTE FUNCTION queue.on_change();
             CREATE TRIGGER b BEFORE INSERT ON forged.q FOR EACH ROW EXECUTE FUNCTION queue.on_change()"
        ))
        .unwrap();
    assert_eq!(code(client.batch_execute("INSERT INTO forged.narrow VALUES (1)")), "0A000");
    assert_eq!(code(client.batch_execute("INSERT INTO forged.q (message) VALUES ('1')")), "0A000", "BEFORE");
    client
        .batch_execute(
            "DROP TRIGGER b ON forged.q;
             INSERT INTO forged.q (msg_id, message, visible_at, expires_at) OVERRIDING SYSTEM VALUE
               SELECT n, '\"forged\"', NULL, now() FROM generate_series(1, 1000) n;
             UPDATE forged.q SET delivery_count = 1000; TRUNCATE forged.q; RESET ROLE",
        )
        .unwrap();
    assert_eq!(picture(&mut client).replace('\n', " "), before.replace('\n', " "));
    assert_eq!(ids(&read(&mut client, "q", 9)), sent[1..]);
}
