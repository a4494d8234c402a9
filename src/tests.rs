//! What one transaction does, seen from inside it. These tests are rolled back and never see a commit: what
//! commits, blocks, races or dies is tested in `pgrx-tests/`.
use pgrx::prelude::*;

#[pg_schema]
mod tests {
    use pgrx::prelude::*;

    #[pg_test]
    fn send_and_read_in_one_transaction_deliver() {
        Spi::run("SELECT queue_create('q')").unwrap();
        let id = Spi::get_one::<i64>("SELECT queue_send('q', '{\"a\": 1}')").unwrap();
        assert_eq!(id, Some(1));
        let read = Spi::get_two::<i64, pgrx::JsonB>("SELECT msg_id, message FROM queue_read('q')").unwrap();
        assert_eq!(read.0, Some(1));
        assert_eq!(read.1.unwrap().0, serde_json::json!({"a": 1}));
        assert_eq!(Spi::get_one::<bool>("SELECT queue_delete('q', 1)").unwrap(), Some(true));
    }
}
