//! What passed, failed and could not run, and the last line that says so.

use std::time::Duration;

/// Counts, with a name for everything that did not pass.
#[derive(Debug, Default)]
pub struct Tally {
    passed: u64,
    failed: Vec<String>,
    skipped: Vec<String>,
    strict: bool,
}

impl Tally {
    /// An empty one. A `strict` one (in CI) counts what could not run as failed.
    pub fn new(strict: bool) -> Self {
        Self { strict, ..Self::default() }
    }

    /// One thing passed: its line, with `detail` if there is any.
    pub fn pass(&mut self, name: &str, took: Duration, detail: &str) {
        self.passed += 1;
        let dash = if detail.is_empty() { "" } else { " - " };
        println!("ok    {name} ({:.1} s){dash}{detail}", took.as_secs_f64());
    }

    /// One thing failed, and how.
    pub fn fail(&mut self, name: &str, took: Duration, how: &str) {
        println!("FAIL  {name} ({:.1} s): {how}", took.as_secs_f64());
        self.failed.push(name.to_owned());
    }

    /// One thing could not run, and why.
    pub fn skip(&mut self, name: &str, why: &str) {
        if self.strict {
            println!("FAIL  {name} could not run, and in CI everything must: {why}");
            self.failed.push(format!("{name} (could not run)"));
        } else {
            println!("skip  {name}: {why}");
            self.skipped.push(name.to_owned());
        }
    }

    /// Many at once, as another program counted them and has already named them.
    pub fn add(&mut self, passed: u64, failed: Vec<String>, skipped: Vec<(String, String)>) {
        self.passed += passed;
        self.failed.extend(failed);
        skipped.iter().for_each(|(name, why)| self.skip(name, why));
    }

    /// Takes up another's counts.
    pub fn join(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
    }

    /// Whether nothing failed.
    pub fn is_good(&self) -> bool {
        self.failed.is_empty()
    }

    /// The last line: `N passed, N failed, N skipped`.
    pub fn line(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed.len(),
            self.skipped.len()
        )
    }

    /// Prints the names of what did not pass, then the last line.
    pub fn print(&self) {
        self.failed.iter().for_each(|name| println!("failed: {name}"));
        self.skipped.iter().for_each(|name| println!("skipped: {name}"));
        println!("{}", self.line());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_run_fails_only_in_ci() {
        for (strict, line) in
            [(false, "1 passed, 0 failed, 1 skipped"), (true, "1 passed, 1 failed, 0 skipped")]
        {
            let mut tally = Tally::new(strict);
            tally.pass("a", Duration::ZERO, "");
            tally.skip("b", "no such thing");
            assert_eq!(tally.line(), line);
            assert_eq!(tally.is_good(), !strict);
        }
    }
}
