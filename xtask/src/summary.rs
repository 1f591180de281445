//! What was done and how it ended. Knows nothing of how anything is run.

use std::fmt;
use std::time::Duration;

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
}

impl Counts {
    pub const PASSED: Counts = Counts { passed: 1, failed: 0, skipped: 0 };
    pub const FAILED: Counts = Counts { passed: 0, failed: 1, skipped: 0 };
    pub const SKIPPED: Counts = Counts { passed: 0, failed: 0, skipped: 1 };

    pub fn add(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// One line of the summary.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub counts: Counts,
    /// What it left out, or why it failed.
    pub notes: Vec<String>,
    pub took: Duration,
}

impl Row {
    pub fn failed(&self) -> bool {
        self.counts.failed > 0
    }

    /// Something that was left out.
    pub fn skipped(name: impl Into<String>, why: impl Into<String>) -> Row {
        Row::at_once(name.into(), Counts::SKIPPED, why.into())
    }

    /// Something that could not even be begun, and should have been.
    pub fn failure(name: impl Into<String>, why: impl Into<String>) -> Row {
        Row::at_once(name.into(), Counts::FAILED, why.into())
    }

    fn at_once(name: String, counts: Counts, why: String) -> Row {
        Row { name, counts, notes: vec![why], took: Duration::ZERO }
    }

    /// `passed`, `FAILED` or `skipped`.
    pub fn verdict(&self) -> &'static str {
        match self.counts {
            Counts { failed: 1.., .. } => "FAILED",
            Counts { passed: 0, skipped: 1.., .. } => "skipped",
            _ => "passed",
        }
    }
}

/// The rows, in the order in which they ended.
#[derive(Default)]
pub struct Summary(Vec<Row>);

impl Summary {
    pub fn new() -> Summary {
        Summary::default()
    }

    pub fn add(&mut self, row: Row) {
        self.0.push(row);
    }

    pub fn extend(&mut self, rows: Vec<Row>) {
        self.0.extend(rows);
    }

    pub fn rows(&self) -> &[Row] {
        &self.0
    }

    pub fn into_rows(self) -> Vec<Row> {
        self.0
    }

    pub fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        self.0.iter().for_each(|row| sum.add(row.counts));
        sum
    }

    pub fn failed(&self) -> bool {
        self.counts().failed > 0
    }

    /// A line for each row, one for each thing left out, and the sum as the very last line.
    pub fn print(&self) {
        println!("\n== summary");
        let width = self.0.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for row in &self.0 {
            let (name, seconds) = (&row.name, row.took.as_secs_f64());
            println!("{name:width$}  {:7}  {seconds:6.1} s  {}", row.verdict(), row.counts);
            for note in &row.notes {
                println!("{:width$}    {note}", "");
            }
        }
        println!("{}", self.counts());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(counts: Counts) -> Row {
        Row { name: String::new(), counts, notes: Vec::new(), took: Duration::ZERO }
    }

    #[test]
    fn one_failure_fails_all() {
        let mut summary = Summary::new();
        summary.add(row(Counts::PASSED));
        summary.add(Row::skipped("x", "no x here"));
        assert!(!summary.failed());
        summary.add(row(Counts { passed: 7, failed: 1, skipped: 0 }));
        assert!(summary.failed());
        assert_eq!(summary.counts().to_string(), "8 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn a_row_says_how_it_ended() {
        assert_eq!(row(Counts { passed: 1, failed: 0, skipped: 1 }).verdict(), "passed");
        assert_eq!(row(Counts::SKIPPED).verdict(), "skipped");
        assert_eq!(row(Counts { passed: 9, failed: 1, skipped: 0 }).verdict(), "FAILED");
        assert_eq!(row(Counts::default()).verdict(), "passed");
    }
}
