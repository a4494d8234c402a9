//! Reads what `cargo test` prints and adds it up.
//!
//! Pure text to numbers: runs nothing.

use std::ops::AddAssign;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    pub ignored: u64,
}

impl Tally {
    pub fn ran(&self) -> u64 {
        self.passed + self.failed
    }

    /// From `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.00s`.
    pub fn from_line(line: &str) -> Option<Self> {
        let (_, counts) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
        let mut tally = Self::default();
        let (mut passed, mut failed) = (false, false);
        for part in counts.split(';') {
            let mut words = part.split_whitespace();
            let (Some(number), Some(what)) = (words.next().and_then(|word| word.parse().ok()), words.next())
            else {
                continue;
            };
            match what {
                "passed" => (tally.passed, passed) = (number, true),
                "failed" => (tally.failed, failed) = (number, true),
                "ignored" => tally.ignored = number,
                _ => {}
            }
        }
        (passed && failed).then_some(tally)
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn result_lines_are_read() {
        let line =
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.00s";
        assert_eq!(Tally::from_line(line), Some(Tally { passed: 5, failed: 0, ignored: 1 }));
        let line =
            "test result: FAILED. 2 passed; 7 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.25s";
        assert_eq!(Tally::from_line(line), Some(Tally { passed: 2, failed: 7, ignored: 0 }));
    }

    #[test]
    fn other_lines_are_not() {
        for line in [
            "test result_is_read ... ok",
            "running 3 tests",
            "test result: ok. 5 passed",
            "",
            "5 passed; 0 failed",
        ] {
            assert_eq!(Tally::from_line(line), None, "{line:?}");
        }
    }

    #[test]
    fn tallies_add_up() {
        let mut sum = Tally { passed: 1, failed: 2, ignored: 3 };
        sum += Tally { passed: 10, failed: 20, ignored: 30 };
        assert_eq!(sum, Tally { passed: 11, failed: 22, ignored: 33 });
        assert_eq!(sum.ran(), 33);
    }
}
