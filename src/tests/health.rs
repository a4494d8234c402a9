//! queue_health: what is wrong, and nothing where nothing is.

#[pgrx::pg_schema]
mod tests {
    use crate::tests::*;
    use serde_json::json;

    const PROBLEM: &str = "SELECT severity, object, fix_sql FROM queue_health() WHERE problem = ";

    #[pg_test]
    fn health_without_a_problem_says_nothing_of_it() {
        run("SELECT queue_create('q')");
        for problem in ["dispatcher_full", "archive_grows"] {
            assert_eq!(rows(&format!("{PROBLEM} '{problem}'")), [] as [serde_json::Value; 0], "{problem}");
        }
    }

    #[pg_test]
    fn health_of_a_large_archive_without_retention_names_it_and_the_cure() {
        run("SELECT queue_create('it''s')");
        run("UPDATE pg_class SET reltuples = 2000000 WHERE oid = 'queue_archive.\"it''s\"'::regclass");
        assert_eq!(
            rows(&format!("{PROBLEM} 'archive_grows'")),
            [json!({"severity": "warning", "object": "it's",
                "fix_sql": "SELECT queue_alter('it''s', archive_retention => '30 days')"})]
        );
        make_role("stranger");
        as_role("stranger", || {
            assert_eq!(number("SELECT count(*) FROM queue_health() WHERE problem = 'archive_grows'"), 0)
        });
        run(value("SELECT fix_sql FROM queue_health() WHERE problem = 'archive_grows'").as_str().unwrap());
        assert_eq!(rows(&format!("{PROBLEM} 'archive_grows'")), [] as [serde_json::Value; 0]);
    }
}
