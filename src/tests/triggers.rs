//! Triggers of a queue's owner: they see what the verbs do, may change it, may forbid it, may send more.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    /// A trigger on queue.q that runs a plpgsql body.
    fn trigger(name: &str, when: &str, body: &str) {
        run(&format!(
            "CREATE FUNCTION f_{name}() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN {body} END $f$"
        ));
        run(&format!("CREATE TRIGGER {name} {when} ON queue.q FOR EACH ROW EXECUTE FUNCTION f_{name}()"));
    }

    #[pg_test]
    fn trigger_on_delete_sees_every_finish() {
        run("SELECT queue_create('q')");
        run("CREATE TABLE seen (msg_id bigint)");
        trigger("watch", "AFTER DELETE", "INSERT INTO seen VALUES (OLD.msg_id); RETURN NULL;");
        run("SELECT * FROM queue_send_batch('q', array_fill('1'::jsonb, ARRAY[10]))");
        assert!(is("queue_delete('q', 1)"));
        assert_eq!(column("SELECT queue_delete_batch('q', '{2}')"), [json!(2)]);
        assert!(is("queue_archive('q', 3)"));
        assert_eq!(column("SELECT queue_archive_batch('q', '{4}')"), [json!(4)]);
        assert_eq!(value("SELECT queue_reject('q', 5)"), json!("archived"));
        assert!(is("queue_cancel('q', 6)"));
        assert_eq!(column("SELECT msg_id FROM queue_pop('q')"), [json!(7)]);
        assert_eq!(column("SELECT msg_id FROM queue_delete_and_read('q', '{8}')"), [json!(9)]);
        run("SELECT queue_alter('q', max_deliveries => 1)");
        assert_eq!(value("SELECT outcome FROM queue_retry('q', 9)"), json!("archived"));
        assert_eq!(number("SELECT queue_purge('q')"), 1);
        assert_eq!(
            column("SELECT msg_id FROM seen ORDER BY 1"),
            (1..=10).map(|id| json!(id)).collect::<Vec<_>>()
        );
    }

    #[pg_test]
    fn trigger_on_delete_asks_a_finisher_for_no_more_than_delete() {
        run("SELECT queue_create('q')");
        run("CREATE TABLE seen (who text)");
        trigger("watch", "AFTER DELETE", "INSERT INTO public.seen VALUES (current_user); RETURN NULL;");
        make_role("finisher");
        run("GRANT DELETE ON queue.q TO finisher");
        run("SELECT * FROM queue_send_batch('q', '{1,2,3}')");
        as_role("finisher", || {
            assert!(is("queue_delete('q', 1)"));
            assert!(is("queue_cancel('q', 2)"));
            assert_eq!(column("SELECT queue_delete_batch('q', '{3,4}')"), [json!(3)]);
        });
        assert!(is("(SELECT array_agg(who) FROM seen) = array_fill(current_user::text, ARRAY[3])"));
    }

    #[pg_test]
    fn trigger_on_delete_that_changes_the_next_message_has_it_archived_so() {
        run("SELECT queue_create('q')");
        trigger(
            "mark",
            "AFTER DELETE",
            "UPDATE queue.q SET headers = '{\"after\": 1}' WHERE msg_id = OLD.msg_id + 1; RETURN NULL;",
        );
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        assert_eq!(column("SELECT queue_archive_batch('q', '{1,2}')"), [json!(1), json!(2)]);
        assert_eq!(value("SELECT headers FROM queue_archive.q WHERE msg_id = 2"), json!({"after": 1}));
    }

    #[pg_test]
    fn trigger_that_suppresses_the_delete_makes_the_finish_false() {
        run("SELECT queue_create('q')");
        trigger("keep", "BEFORE DELETE", "RETURN NULL;");
        run("SELECT * FROM queue_send_batch('q', '{1,2}')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        assert!(!is(&format!("queue_delete('q', 1, {lease})")));
        assert!(!is(&format!("queue_archive('q', 1, {lease})")));
        assert_eq!(value(&format!("SELECT queue_reject('q', 1, {lease})")), json!("lost"));
        fails(&format!("SELECT queue_delete('q', 1, {lease}, true)")).says("P0002", "message 1 of queue \"q\"");
        assert!(!is("queue_cancel('q', 2)"));
        assert_eq!(number("SELECT count(*) FROM queue.q"), 2);
        assert_eq!(number("SELECT count(*) FROM queue_archive.q"), 0);
        run("DROP TRIGGER keep ON queue.q");
        assert!(is(&format!("queue_delete('q', 1, {lease})")), "it is still held");
        assert_eq!(column("SELECT msg_id FROM queue_read('q')"), [json!(2)]);
    }

    #[pg_test]
    fn trigger_that_suppresses_the_delete_of_a_pop_leaves_the_message() {
        run("SELECT queue_create('q')");
        trigger("keep", "BEFORE DELETE", "RETURN NULL;");
        run("SELECT queue_send('q', '1')");
        // Nor is it tried again at once: only after a second. Of a few attempts one: that second may be over by then.
        let is_put_off = || {
            assert_eq!(number("SELECT count(*) FROM queue_pop('q')"), 0, "what is not deleted is not popped");
            let is_put_off = number("SELECT count(*) FROM queue_read('q')") == 0;
            if !is_put_off {
                run("SELECT queue_release('q', '{1}')");
            }
            is_put_off
        };
        assert!((0..5).any(|_| is_put_off()), "it is tried again at once");
        run("DROP TRIGGER keep ON queue.q");
        assert_eq!(number("SELECT count(*) FROM queue.q"), 1);
        let read = "SELECT msg_id FROM queue_read('q', wait => '10 s')";
        assert_eq!(column(read), [json!(1)], "it is not forgotten");
    }

    #[pg_test]
    fn trigger_that_fails_fails_the_finish_and_leaves_the_lease() {
        run("SELECT queue_create('q')");
        trigger("forbid", "BEFORE DELETE", "RAISE EXCEPTION 'never';");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        fails("SELECT queue_delete('q', 1)").says("P0001", "never");
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 0);
        run("DROP TRIGGER forbid ON queue.q");
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }

    #[pg_test]
    fn trigger_that_suppresses_the_insert_makes_the_send_null() {
        run("SELECT queue_create('q')");
        trigger("filter", "BEFORE INSERT", "IF NEW.message = '0' THEN RETURN NULL; END IF; RETURN NEW;");
        assert!(is("queue_send('q', '0') IS NULL"));
        assert!(is("queue_send('q', '1') IS NOT NULL"));
        assert_eq!(number("SELECT count(*) FROM queue_send_batch('q', '{0,2,0,3}')"), 2);
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(1), json!(2), json!(3)]);
    }

    #[pg_test]
    fn trigger_that_changes_the_insert_is_respected() {
        run("SELECT queue_create('q')");
        trigger(
            "change",
            "BEFORE INSERT",
            "NEW.message := '\"changed\"'; NEW.msg_id := NEW.msg_id + 100; \
             IF NEW.headers IS NOT NULL THEN NEW.visible_at := now() + '1 h'; END IF; RETURN NEW;",
        );
        assert_eq!(number("SELECT queue_send('q', '1')"), 101);
        assert_eq!(number("SELECT queue_send('q', '1', '{}')"), 102);
        assert_eq!(
            rows("SELECT msg_id, message FROM queue_read('q', 9)"),
            [json!({"msg_id": 101, "message": "changed"})]
        );
    }

    #[pg_test]
    fn trigger_that_sends_to_another_queue_leaves_the_ids_right() {
        run("SELECT queue_create('q'), queue_create('copy')");
        run("SELECT queue_send('copy', '0')");
        trigger("z_after_ours", "AFTER INSERT", "PERFORM queue_send('copy', NEW.message); RETURN NULL;");
        assert_eq!(number("SELECT queue_send('q', '1')"), 1);
        assert_eq!(column("SELECT * FROM queue_send_batch('q', '{2,3}')"), [json!(2), json!(3)]);
        assert_eq!(column("SELECT queue_send_entries('q', '[{\"message\": 4}]')"), [json!(4)]);
        assert_eq!(column("SELECT message FROM queue_read('q', 9)"), [json!(1), json!(2), json!(3), json!(4)]);
        assert_eq!(
            column("SELECT message FROM queue_read('copy', 9)"),
            [json!(0), json!(1), json!(2), json!(3), json!(4)]
        );
    }

    #[pg_test]
    fn trigger_that_sends_a_batch_elsewhere_leaves_the_ids_right() {
        run("SELECT queue_create('q'), queue_create('copy')");
        trigger(
            "z_after_ours",
            "AFTER INSERT",
            "PERFORM queue_send_batch('copy', ARRAY[NEW.message, '0']); RETURN NULL;",
        );
        assert_eq!(number("SELECT queue_send('q', '1')"), 1);
        assert_eq!(column("SELECT * FROM queue_send_batch('q', '{2,3}')"), [json!(2), json!(3)]);
        assert_eq!(number("SELECT count(*) FROM queue_read('copy', 9)"), 6);
    }

    #[pg_test]
    fn trigger_that_sends_before_the_insert_leaves_the_ids_right() {
        run("SELECT queue_create('q'), queue_create('copy')");
        run("SELECT queue_send('copy', '0')");
        trigger("before", "BEFORE INSERT", "PERFORM queue_send('copy', NEW.message); RETURN NEW;");
        assert_eq!(number("SELECT queue_send('q', '1')"), 1);
        assert_eq!(column("SELECT * FROM queue_send_batch('q', '{2,3}')"), [json!(2), json!(3)]);
    }

    #[pg_test]
    fn trigger_that_sends_to_the_same_queue_leaves_the_ids_right() {
        run("SELECT queue_create('q')");
        trigger(
            "z_after_ours",
            "AFTER INSERT",
            "IF NEW.headers IS NULL THEN PERFORM queue_send('q', NEW.message, '{\"copy\": true}'); END IF; RETURN NULL;",
        );
        assert_eq!(number("SELECT queue_send('q', '1')"), 1);
        assert_eq!(column("SELECT * FROM queue_send_batch('q', '{2}')"), [json!(3)]);
        assert_eq!(number("SELECT count(*) FROM queue_read('q', 9)"), 4);
    }

    #[pg_test]
    fn trigger_on_update_that_touches_another_queue_leaves_the_retry_right() {
        run("SELECT queue_create('q'), queue_create('other')");
        run("SELECT queue_send('q', '1'), queue_send('other', '\"x\"')");
        trigger("z_after_ours", "AFTER UPDATE", "UPDATE queue.other SET message = '\"y\"'; RETURN NULL;");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(value("SELECT outcome FROM queue_retry('q', 1, delay => '0')"), json!("retried"));
        assert_eq!(rows("SELECT msg_id, message FROM queue_read('q')"), [json!({"msg_id": 1, "message": 1})]);
        assert_eq!(column("SELECT message FROM queue_read('other')"), [json!("y")]);
    }

    #[pg_test]
    fn trigger_on_update_that_retries_in_another_queue_leaves_both_right() {
        run("SELECT queue_create('q'), queue_create('other')");
        run("SELECT queue_send('q', '1'), queue_send('other', '2')");
        run("SELECT * FROM queue_read_any('{q,other}', 2)");
        trigger(
            "z_after_ours",
            "AFTER UPDATE",
            "PERFORM * FROM queue_retry('other', 1, delay => '1 h'); RETURN NULL;",
        );
        assert_eq!(value("SELECT outcome FROM queue_retry('q', 1, delay => '0')"), json!("retried"));
        assert_eq!(column("SELECT message FROM queue_read_any('{q,other}', 2)"), [json!(1)]);
        assert!(is("(SELECT visible_at > now() + '59 min' FROM queue.other)"));
    }

    #[pg_test]
    fn trigger_on_update_that_changes_the_time_is_respected() {
        run("SELECT queue_create('q')");
        trigger("later", "BEFORE UPDATE", "NEW.visible_at := now() + '1 h'; RETURN NEW;");
        run("SELECT queue_send('q', '1')");
        run("SELECT * FROM queue_read('q')");
        assert_eq!(value("SELECT outcome FROM queue_retry('q', 1, delay => '0')"), json!("retried"));
        assert_eq!(number("SELECT count(*) FROM queue_read('q')"), 0, "its row says later");
    }

    #[pg_test]
    fn trigger_on_update_that_suppresses_it_makes_the_retry_lost_and_leaves_the_lease() {
        run("SELECT queue_create('q')");
        trigger("never", "BEFORE UPDATE", "RETURN NULL;");
        run("SELECT queue_send('q', '1')");
        let lease = number("SELECT lease_id FROM queue_read('q')");
        assert_eq!(value("SELECT outcome FROM queue_retry('q', 1, delay => '0')"), json!("lost"));
        assert_eq!(number("SELECT count(*) FROM queue_release('q', '{1}', delay => '1 h')"), 0);
        assert!(is(&format!("queue_delete('q', 1, {lease})")));
    }
}
