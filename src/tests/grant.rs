//! queue_grant and queue_revoke: plain grants on the tables underneath.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    /// The privileges that a role has on a table.
    fn rights(role: &str, table: &str) -> String {
        value(&format!(
            "SELECT coalesce(string_agg(r, ' ' ORDER BY n), '') \
             FROM unnest('{{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}}'::text[]) WITH ORDINALITY AS u (r, n) \
             WHERE has_table_privilege('{role}', '{table}', r)"
        ))
        .as_str()
        .unwrap()
        .to_owned()
    }

    #[pg_test]
    fn grant_of_each_capability_gives_the_documented_rights() {
        for (capability, on_queue) in [
            ("send", "INSERT"),
            ("observe", "SELECT"),
            ("consume", "SELECT UPDATE DELETE"),
            ("admin", "SELECT UPDATE DELETE TRUNCATE"),
        ] {
            run("SELECT queue_create('q')");
            make_role("somebody");
            assert!(is(&format!("queue_grant('q', 'somebody', '{capability}')")));
            assert_eq!(rights("somebody", "queue.q"), on_queue, "{capability}");
            assert!(is(&format!("queue_grant('q', 'somebody', '{capability}')")), "again");
            assert!(is(&format!("queue_revoke('q', 'somebody', '{capability}')")));
            assert_eq!(rights("somebody", "queue.q"), "", "{capability}");
            assert_eq!(rights("somebody", "queue_archive.q"), "", "{capability}");
            assert!(is(&format!("queue_revoke('q', 'somebody', '{capability}')")), "again");
            run("DROP ROLE somebody");
            run("SELECT queue_drop('q')");
        }
    }

    #[pg_test]
    fn grant_to_public_gives_it_to_all() {
        run("SELECT queue_create('q')");
        make_role("somebody");
        assert!(is("queue_grant('q', 'public', 'send')"));
        assert_eq!(rights("somebody", "queue.q"), "INSERT");
        assert!(is("queue_revoke('q', 'public', 'send')"));
        assert_eq!(rights("somebody", "queue.q"), "");
    }

    #[pg_test]
    fn grant_to_a_role_with_a_strange_name_works() {
        run("SELECT queue_create('a\"b')");
        for role in ["We\"ird; DROP", "Select", "two words"] {
            make_role(&format!("\"{}\"", role.replace('"', "\"\"")));
            assert!(is(&format!("queue_grant('a\"b', '{role}', 'consume')")));
            assert!(is(&format!("has_table_privilege('{role}', 'queue.\"a\"\"b\"', 'DELETE')")));
            assert!(is(&format!("queue_revoke('a\"b', '{role}', 'consume')")));
            assert!(!is(&format!("has_table_privilege('{role}', 'queue.\"a\"\"b\"', 'DELETE')")));
        }
    }

    #[pg_test]
    fn grant_to_a_role_that_is_not_there_is_refused() {
        run("SELECT queue_create('q')");
        for verb in ["queue_grant", "queue_revoke"] {
            fails(&format!("SELECT {verb}('q', 'nobody_at_all', 'send')")).is(
                "42704",
                "role \"nobody_at_all\" does not exist",
                "",
                "",
            );
            fails(&format!("SELECT {verb}('q', '', 'send')")).says("42704", "role \"\" does not exist");
            fails(&format!("SELECT {verb}('none', 'public', 'send')")).is_unknown_queue("none");
        }
    }

    #[pg_test]
    fn grant_of_an_unknown_capability_is_refused() {
        run("SELECT queue_create('q')");
        for verb in ["queue_grant", "queue_revoke"] {
            for capability in ["INSERT", "Send", "", "send, consume", "all"] {
                fails(&format!("SELECT {verb}('q', 'public', '{capability}')")).is_out_of_range(
                    "capability",
                    &format!("\"{capability}\""),
                    "send, observe, consume, admin",
                );
            }
        }
    }

    #[pg_test]
    fn grant_by_a_role_that_may_not_is_refused() {
        run("SELECT queue_create('q')");
        make_role("stranger");
        make_role("friend");
        for verb in ["queue_grant", "queue_revoke"] {
            as_role("stranger", || {
                assert_eq!(fails(&format!("SELECT {verb}('q', 'friend', 'send')")).sqlstate, "42501");
            });
        }
    }

    #[pg_test]
    fn grant_by_a_role_that_has_but_may_not_pass_on_is_refused() {
        run("SELECT queue_create('q')");
        make_role("consumer");
        make_role("friend");
        run("SELECT queue_grant('q', 'consumer', 'consume')");
        as_role("consumer", || {
            let failure = fails("SELECT queue_grant('q', 'friend', 'consume')");
            assert_eq!(failure.sqlstate, "42501", "{failure:?}");
        });
        assert_eq!(rights("friend", "queue.q"), "");
    }

    #[pg_test]
    fn grant_with_grant_option_by_plain_sql_lets_it_be_passed_on() {
        run("SELECT queue_create('q')");
        make_role("manager");
        make_role("friend");
        run("GRANT INSERT ON queue.q TO manager WITH GRANT OPTION");
        as_role("manager", || assert!(is("queue_grant('q', 'friend', 'send')")));
        assert_eq!(rights("friend", "queue.q"), "INSERT");
    }

    #[pg_test]
    fn grant_by_the_owner_works_without_superuser() {
        make_role("owner_of_q");
        make_role("friend");
        run("GRANT CREATE ON SCHEMA queue TO owner_of_q");
        as_role("owner_of_q", || {
            run("SELECT queue_create('q')");
            assert!(is("queue_grant('q', 'friend', 'admin')"));
        });
        as_role("friend", || assert!(is("queue_pause('q')")));
        as_role("owner_of_q", || assert!(is("queue_revoke('q', 'friend', 'admin')")));
        as_role("friend", || assert_eq!(fails("SELECT queue_resume('q')").sqlstate, "42501"));
    }

    #[pg_test]
    fn grant_undone_gives_nothing() {
        run("SELECT queue_create('q')");
        make_role("somebody");
        undone("PERFORM queue_grant('q', 'somebody', 'send');");
        as_role("somebody", || assert_eq!(fails("SELECT queue_send('q', '1')").sqlstate, "42501"));
        assert_eq!(column("SELECT queue FROM queue_list()"), [json!("q")]);
    }
}
