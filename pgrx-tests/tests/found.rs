//! What the model has found (`tests/model`), or was seen beside it, each by itself. Every one of these failed before it
//! was mended.

mod common;

use common::*;
use postgres::Client;

fn value<T: for<'a> postgres::types::FromSql<'a>>(client: &mut Client, sql: &str) -> T {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

#[test]
fn message_named_before_it_was_there_is_read_once_by_its_sender() {
    let database = database_with(&["q"]);
    let (mut sender, mut other) = (session(&database), session(&database));
    assert!(read(&mut sender, "q", 1).is_empty());
    sender.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut sender, "q", 1);
    let sql = format!("SELECT queue_delete('q', {msg_id}, strict => true)");
    assert_eq!(code(other.query(&sql, &[])), "P0002");
    assert_eq!(ids(&read(&mut sender, "q", 9)), [msg_id], "one lease at a time");
    sender.batch_execute("COMMIT").unwrap();
    assert!(read(&mut other, "q", 9).is_empty(), "it is leased");
}

#[test]
fn message_named_before_it_was_there_is_not_lost_when_its_sender_has_read_it() {
    let database = database_with(&["q", "r"]);
    let (mut sender, mut other) = (session(&database), session(&database));
    assert!(read(&mut sender, "q", 1).is_empty());
    for end in ["COMMIT", "ROLLBACK"] {
        sender.batch_execute("BEGIN").unwrap();
        let msg_id = send(&mut sender, "q", 1);
        let own = read_for(&mut sender, "q", 1, "1 day").remove(0);
        other.batch_execute("BEGIN").unwrap();
        send(&mut other, "r", 1); // so it has an id, and may have deleted what it does not find
        assert!(!delete_id(&mut other, "q", msg_id));
        sender.batch_execute("COMMIT").unwrap();
        assert!(read(&mut sender, "q", 9).is_empty());
        other.batch_execute(end).unwrap();
        assert!(read(&mut sender, "q", 9).is_empty(), "its lease runs");
        assert!(release(&mut sender, "q", &own), "under its fence, after {end}");
        let again = read_one(&mut sender, "q");
        assert_eq!((again.msg_id, again.count), (msg_id, 1));
        assert!(delete(&mut sender, "q", &again));
    }
}

#[test]
fn call_that_found_nothing_keeps_nobody_from_a_message_that_comes() {
    let database = database_with(&["q"]);
    let (mut sender, mut other) = (session(&database), session(&database));
    assert!(read(&mut sender, "q", 1).is_empty());
    other.batch_execute("BEGIN").unwrap();
    sender.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut sender, "q", 1);
    assert!(!delete_id(&mut other, "q", msg_id));
    for sql in ["SELECT outcome FROM queue_retry('q', $1)", "SELECT queue_reject('q', $1)"] {
        assert_eq!(other.query_one(sql, &[&msg_id]).unwrap().get::<_, &str>(0), "lost");
    }
    sender.batch_execute("COMMIT").unwrap();
    assert_eq!(ids(&read(&mut sender, "q", 1)), [msg_id]);
    other.batch_execute("COMMIT").unwrap();
}

#[test]
fn lease_shortened_and_lengthened_again_ends_as_was_said_last() {
    let database = database_with(&["q"]);
    let (mut client, mut other) = (session(&database), session(&database));
    for (first, last) in [("1 ms", "1 day"), ("1 ms", "5 min")] {
        let msg_id = send(&mut client, "q", 1);
        let one = read_for(&mut client, "q", 1, "10 min").remove(0);
        client.batch_execute("BEGIN").unwrap();
        assert!(extend(&mut client, "q", &one, first).is_some());
        let ends = extend(&mut client, "q", &one, last).unwrap();
        client.batch_execute("COMMIT").unwrap();
        let is_as_told: bool = value(
            &mut client,
            &format!("SELECT abs(extract(epoch FROM lease_expires_at - '{ends}')) < 1 FROM queue_peek('q') WHERE msg_id = {msg_id} AND state = 'leased'"),
        );
        assert!(is_as_told, "{first}, then {last}");
        assert!(read(&mut other, "q", 1).is_empty());
        assert!(delete(&mut client, "q", &one));
    }
}

#[test]
fn pause_holds_for_the_own_messages_of_a_transaction_that_was_open_before() {
    let database = database_with(&["q"]);
    let (mut sender, mut other) = (session(&database), session(&database));
    sender.batch_execute("BEGIN").unwrap();
    let sent = send_many(&mut sender, "q", 2);
    assert_eq!(ids(&read(&mut sender, "q", 1)), sent[..1]);
    other.execute("SELECT queue_pause('q')", &[]).unwrap();
    assert!(read(&mut sender, "q", 1).is_empty());
    other.execute("SELECT queue_resume('q')", &[]).unwrap();
    assert_eq!(ids(&read(&mut sender, "q", 1)), sent[1..]);
    sender.batch_execute("COMMIT").unwrap();
}

#[test]
fn undone_read_of_an_own_message_counts_whoever_named_it_meanwhile() {
    let database = database_with(&["q", "r"]);
    let (mut sender, mut other) = (session(&database), session(&database));
    assert!(read(&mut sender, "q", 1).is_empty());
    for end in ["COMMIT", "ROLLBACK"] {
        sender.batch_execute("BEGIN").unwrap();
        let msg_id = send(&mut sender, "q", 1);
        sender.batch_execute("SAVEPOINT a").unwrap();
        assert_eq!(read_one(&mut sender, "q").count, 1);
        sender.batch_execute("ROLLBACK TO a").unwrap();
        other.batch_execute("BEGIN").unwrap();
        send(&mut other, "r", 1); // so it has an id, and may have deleted what it does not find
        assert!(!delete_id(&mut other, "q", msg_id));
        sender.batch_execute("COMMIT").unwrap();
        other.batch_execute(end).unwrap();
        let again = read_one(&mut sender, "q");
        assert_eq!((again.msg_id, again.count), (msg_id, 2), "after {end}");
        assert!(delete(&mut sender, "q", &again));
    }
}

#[test]
fn message_named_in_vain_before_it_was_there_is_not_lost_when_another_finishes_it_in_vain_too() {
    let database = database_with(&["q", "r"]);
    let (mut sender, mut other, mut third) = (session(&database), session(&database), session(&database));
    assert!(read(&mut sender, "q", 1).is_empty());
    sender.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut sender, "q", 1);
    let own = read_for(&mut sender, "q", 1, "1 day").remove(0);
    other.batch_execute("BEGIN").unwrap();
    send(&mut other, "r", 1); // so it has an id, and may have deleted what it does not find
    assert!(!delete_id(&mut other, "q", msg_id));
    other.batch_execute("ROLLBACK").unwrap();
    third.batch_execute("BEGIN").unwrap();
    send(&mut third, "r", 1);
    assert!(!delete_id(&mut third, "q", msg_id));
    sender.batch_execute("COMMIT").unwrap();
    third.batch_execute("COMMIT").unwrap();
    assert!(read(&mut other, "q", 1).is_empty(), "its lease runs");
    assert!(release(&mut sender, "q", &own));
    assert_eq!(read_awaited(&mut other, "q").msg_id, msg_id);
}

#[test]
fn read_that_found_a_message_before_it_was_there_is_no_delivery() {
    let database = database_with(&["q", "r"]);
    let (mut sender, mut other, mut third) = (session(&database), session(&database), session(&database));
    assert!(read(&mut sender, "q", 1).is_empty());
    sender.batch_execute("BEGIN").unwrap();
    let msg_id = send(&mut sender, "q", 1);
    other.batch_execute("BEGIN").unwrap();
    send(&mut other, "r", 1);
    assert!(!delete_id(&mut other, "q", msg_id));
    other.batch_execute("ROLLBACK").unwrap(); // something may be there
    third.batch_execute("BEGIN").unwrap();
    send(&mut third, "r", 1);
    assert!(read(&mut third, "q", 1).is_empty());
    sender.batch_execute("COMMIT").unwrap();
    third.batch_execute("ROLLBACK").unwrap();
    let one = read_awaited(&mut sender, "q");
    assert_eq!((one.msg_id, one.count), (msg_id, 1));
}

#[test]
fn read_that_gave_nothing_fences_nothing() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 1).is_empty());
    let msg_id = send(&mut client, "q", 1);
    client.batch_execute("UPDATE queue.q SET visible_at = clock_timestamp() + '100 s'").unwrap();
    client.batch_execute("BEGIN").unwrap();
    assert!(read(&mut client, "q", 1).is_empty());
    assert!(delete_id(&mut client, "q", msg_id), "nobody holds it");
    client.batch_execute("COMMIT").unwrap();
}

#[test]
fn release_of_what_is_not_there_leaves_nothing_behind() {
    let database = database_with(&["q"]);
    let mut client = session(&database);
    assert!(read(&mut client, "q", 1).is_empty());
    assert!(client.query("SELECT queue_release('q', ARRAY[77])", &[]).unwrap().is_empty());
    let ready: Option<String> = value(&mut client, "CALL queue_wait(ARRAY['q'], '0 s')");
    assert_eq!(ready, None);
}
