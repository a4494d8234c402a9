//! What was measured: figures by workload, variant and system; the goals; the table; the JSON.
//!
//! Owns medians and ratios and how they are shown. Never runs anything.

use serde_json::{json, Value};

use super::goals::Goal;
use super::systems::{BARE, HAND, PGMQ, PG_QUEUE};

/// The rounds of one measurement.
#[derive(Clone, Debug)]
pub struct Figure {
    pub workload: &'static str,
    /// Which of the workload's cases, e.g. `8 clients`.
    pub variant: String,
    pub system: &'static str,
    pub rounds: Vec<f64>,
}

impl Figure {
    pub fn median(&self) -> Option<f64> {
        median(&self.rounds)
    }
}

/// A workload's name for `--only`, title and unit.
#[derive(Clone, Copy, Debug)]
pub struct Title {
    pub workload: &'static str,
    pub title: &'static str,
    pub unit: &'static str,
}

/// In which the systems' columns come; others after them.
const ORDER: [&str; 4] = [PG_QUEUE.name, PGMQ.name, HAND.name, BARE.name];

#[derive(Debug, Default)]
pub struct Report {
    pub titles: Vec<Title>,
    pub figures: Vec<Figure>,
    /// What a reader must know to judge a figure, by workload.
    pub notes: Vec<(&'static str, String)>,
}

impl Report {
    pub fn begin(&mut self, title: Title) {
        self.titles.push(title);
    }

    pub fn add(&mut self, workload: &'static str, variant: &str, system: &'static str, value: f64) {
        let is_this = |f: &&mut Figure| f.workload == workload && f.variant == variant && f.system == system;
        match self.figures.iter_mut().find(is_this) {
            Some(figure) => figure.rounds.push(value),
            None => {
                self.figures.push(Figure { workload, variant: variant.to_owned(), system, rounds: vec![value] })
            }
        }
    }

    pub fn note(&mut self, workload: &'static str, note: impl Into<String>) {
        let note = (workload, note.into());
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    pub fn median(&self, workload: &str, variant: &str, system: &str) -> Option<f64> {
        self.figure(workload, variant, system)?.median()
    }

    /// How many times as much as `by` `of` has, each a variant and a system: the median over the rounds of each
    /// round's ratio, because neighbours in time had the same machine.
    pub fn ratio(&self, workload: &str, of: (&str, &str), by: (&str, &str)) -> Option<f64> {
        let (of, by) = (self.figure(workload, of.0, of.1)?, self.figure(workload, by.0, by.1)?);
        if of.rounds.len() != by.rounds.len() {
            return Some(of.median()? / by.median()?);
        }
        let ratios: Vec<f64> = of.rounds.iter().zip(&by.rounds).map(|(of, by)| of / by).collect();
        median(&ratios)
    }

    pub fn figure(&self, workload: &str, variant: &str, system: &str) -> Option<&Figure> {
        self.figures.iter().find(|f| f.workload == workload && f.variant == variant && f.system == system)
    }

    /// The variants of a workload, in the order in which they came.
    pub fn variants(&self, workload: &str) -> Vec<&str> {
        in_order(self.figures.iter().filter(|f| f.workload == workload).map(|f| f.variant.as_str()))
    }

    /// The systems of a workload: ours, then the others in the order in which they came.
    pub fn systems(&self, workload: &str) -> Vec<&'static str> {
        let mut systems = in_order(self.figures.iter().filter(|f| f.workload == workload).map(|f| f.system));
        let place = |system: &&str| ORDER.iter().position(|known| known == system).unwrap_or(ORDER.len());
        systems.sort_by_key(place);
        systems
    }

    /// Prints every workload's medians, with how many times faster or slower the first system is, and the goals.
    pub fn print(&self, goals: &[Goal]) {
        for title in &self.titles {
            self.print_workload(title, goals);
        }
    }

    fn print_workload(&self, title: &Title, goals: &[Goal]) {
        let systems = self.systems(title.workload);
        let variants = self.variants(title.workload);
        let Some(first) = systems.first() else { return };
        let wide = variants.iter().map(|v| v.chars().count()).max().unwrap_or(0).max(12);
        println!("\n{} ({})", title.title, title.unit);
        let heads: Vec<String> = systems.iter().map(|system| format!("{system:>16}")).collect();
        println!("    {:<wide$} {}   {first} / each   goal", "", heads.join(" "));
        for variant in &variants {
            let value = |system: &str| self.median(title.workload, variant, system);
            let cells: Vec<String> = systems
                .iter()
                .map(|system| format!("{:>16}", value(system).map_or_else(|| "-".into(), shown)))
                .collect();
            let ratio = |system: &&str| {
                let ratio = self.ratio(title.workload, (variant, first), (variant, system));
                ratio.filter(|r| r.is_finite()).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
            };
            let ratios: Vec<String> = systems[1..].iter().map(ratio).collect();
            let judged: Vec<&Goal> = goals
                .iter()
                .filter(|goal| goal.workload == title.workload && goal.variant == *variant)
                .collect();
            let mut line = format!("    {variant:<wide$} {}   {:<16}", cells.join(" "), ratios.join(" "));
            for goal in &judged {
                line.push_str(&format!(" {};", goal.verdict()));
            }
            println!("{}", line.trim_end_matches([' ', ';']));
        }
        for (_, note) in self.notes.iter().filter(|(workload, _)| *workload == title.workload) {
            println!("    ({note})");
        }
    }

    pub fn to_json(&self, goals: &[Goal]) -> Value {
        let figures = |title: &Title| -> Vec<Value> {
            let of_this = self.figures.iter().filter(|figure| figure.workload == title.workload);
            of_this
                .map(|f| {
                    json!({ "variant": f.variant, "system": f.system, "median": f.median(), "rounds": f.rounds })
                })
                .collect()
        };
        let notes = |title: &Title| -> Vec<&str> {
            let of_this = self.notes.iter().filter(|(workload, _)| *workload == title.workload);
            of_this.map(|(_, note)| note.as_str()).collect()
        };
        let workloads: Vec<Value> = self
            .titles
            .iter()
            .map(|title| {
                json!({
                    "workload": title.workload, "title": title.title, "unit": title.unit,
                    "figures": figures(title), "notes": notes(title),
                })
            })
            .collect();
        json!({ "workloads": workloads, "goals": goals.iter().map(Goal::to_json).collect::<Vec<_>>() })
    }
}

fn in_order<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        len if len % 2 == 0 => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        _ => Some(sorted[middle]),
    }
}

/// A figure with the digits that mean something: `12,345`, `312.4`, `1.53`.
pub fn shown(value: f64) -> String {
    if value.abs() < 10.0 {
        return format!("{value:.2}");
    }
    if value.abs() < 1_000.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 {
        format!("-{text}")
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_or_between_the_middles() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn figures_are_shown_with_digits_that_mean_something() {
        assert_eq!(shown(1.534), "1.53");
        assert_eq!(shown(312.44), "312.4");
        assert_eq!(shown(999.96), "1000.0");
        assert_eq!(shown(1_234_567.8), "1,234,568");
        assert_eq!(shown(0.0), "0.00");
    }

    #[test]
    fn rounds_of_one_case_come_together() {
        let mut report = Report::default();
        report.add("send", "8 clients", "a", 1.0);
        report.add("send", "8 clients", "b", 5.0);
        report.add("send", "8 clients", "a", 3.0);
        assert_eq!(report.median("send", "8 clients", "a"), Some(2.0));
        assert_eq!(report.systems("send"), ["a", "b"]);
        assert_eq!(report.median("send", "1 client", "a"), None);
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let mut report = Report::default();
        for (ours, theirs) in [(10.0, 5.0), (100.0, 50.0), (30.0, 10.0)] {
            report.add("send", "8 clients", "pg_queue", ours);
            report.add("send", "8 clients", "pgmq", theirs);
        }
        assert_eq!(report.ratio("send", ("8 clients", "pg_queue"), ("8 clients", "pgmq")), Some(2.0));
        assert_eq!(report.ratio("send", ("8 clients", "pg_queue"), ("8 clients", "bare")), None);
        report.add("send", "8 clients", "pgmq", 10.0);
        assert_eq!(report.ratio("send", ("8 clients", "pg_queue"), ("8 clients", "pgmq")), Some(3.0));
    }
}
