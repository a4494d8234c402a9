//! The picture for the README: an SVG with a panel for each workload.
//!
//! Every axis is linear and begins at zero. A bar is the median of the rounds, the thin line on it reaches from the
//! slowest to the fastest. Drawn by hand: rectangles and text need no library, and its fonts could not be measured
//! anyway. Never decides what was measured.

use std::fmt::Write;

use serde_json::Value;

use super::report::{shown, Figure, Report};
use super::throughput::{clients_variant, ONE_STATEMENT};

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 24.0;
const GAP: f64 = 36.0;
const PANEL_WIDTH: f64 = (WIDTH - 2.0 * MARGIN - GAP) / 2.0;
const TITLE_HEIGHT: f64 = 44.0;
const BAR_HEIGHT: f64 = 20.0;
const BAR_STEP: f64 = 27.0;
const AXIS_HEIGHT: f64 = 30.0;
/// Room for the names before the bars, and for the figures after the longest.
const NAME_WIDTH: f64 = 104.0;
const VALUE_WIDTH: f64 = 64.0;
const LINES_HEIGHT: f64 = 190.0;
const TICKS_MAX: f64 = 5.0;
const OURS: &str = "#1b6ca8";

/// Colours that are told apart without colour vision: dark, and lighter from one to the next.
fn colour(system: &str) -> &'static str {
    match system {
        "pg_queue" => OURS,
        "one statement" => "#5aa9e0",
        "pgmq" => "#c8553d",
        "SKIP LOCKED" | "NOTIFY + claim" => "#e0a458",
        _ => "#9a9a9a",
    }
}

/// A panel: its title, and which figures it shows.
struct Panel<'a> {
    title: &'static str,
    unit: &'static str,
    figures: Vec<&'a Figure>,
    /// The variants as one line for each system, instead of bars.
    is_over_time: bool,
}

impl Panel<'_> {
    fn height(&self) -> f64 {
        let inside = if self.is_over_time { LINES_HEIGHT } else { self.figures.len() as f64 * BAR_STEP };
        TITLE_HEIGHT + inside + AXIS_HEIGHT
    }
}

/// The picture, or None if nothing was measured that belongs on it.
pub fn draw(report: &Report, about: &Value) -> Option<String> {
    let panels = panels(report);
    if panels.is_empty() {
        return None;
    }
    let mut body = String::new();
    let mut y = MARGIN;
    for row in panels.chunks(2) {
        for (column, panel) in row.iter().enumerate() {
            let x = MARGIN + column as f64 * (PANEL_WIDTH + GAP);
            draw_panel(&mut body, panel, x, y);
        }
        y += row.iter().map(Panel::height).fold(0.0, f64::max) + 14.0;
    }
    for line in footer(about) {
        text(&mut body, MARGIN, y + 10.0, "start", "small", &line);
        y += 16.0;
    }
    let height = y + MARGIN / 2.0;
    Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
         height=\"{height:.0}\" role=\"img\" aria-label=\"pg_queue, pgmq, SKIP LOCKED and bare PostgreSQL compared\">\n\
         <style>text {{ font-family: sans-serif; font-size: 12px; fill: #222; }} .title {{ font-size: 14px; font-weight: bold; }} \
         .small {{ font-size: 11px; fill: #555; }} .ours {{ font-weight: bold; }}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    ))
}

fn panels(report: &Report) -> Vec<Panel<'_>> {
    let eight = clients_variant(8);
    let of = |workload: &str, variant: &str| -> Vec<&Figure> {
        let systems = report.systems(workload);
        systems.iter().filter_map(|system| report.figure(workload, variant, system)).collect()
    };
    let over_time = report.figures.iter().filter(|figure| figure.workload == "snapshot").collect();
    // A poll of 100 ms would leave the others no length that one could see.
    let woken = ["p50", "p99"].iter().flat_map(|variant| of("wake_up", variant));
    let woken = woken.filter(|figure| figure.system != "pgmq poll").collect();
    let messages = "messages/s";
    let all = [
        ("Send one message a transaction, 8 clients", messages, of("send", &eight), false),
        ("Send batches of 100, 8 clients", messages, of("send_batch", &eight), false),
        ("Read 1 and delete it, 8 clients", messages, of("read_delete", &eight), false),
        ("Read 100 and delete them, 8 clients", messages, of("read_delete_batch", &eight), false),
        ("Read 1 and delete it while a snapshot is held", "messages/s, by seconds of work", over_time, true),
        ("COMMIT of a send to the return of a blocked reader", "microseconds", woken, false),
    ];
    let panels = all.into_iter().map(|(title, unit, figures, is_over_time)| Panel {
        title,
        unit,
        figures,
        is_over_time,
    });
    panels.filter(|panel| !panel.figures.is_empty()).collect()
}

fn footer(about: &Value) -> Vec<String> {
    let word = |path: &str| {
        about
            .pointer(path)
            .map_or_else(String::new, |v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
    };
    let postgres = word("/versions/postgres");
    let version: Vec<&str> = postgres.split_whitespace().take(2).collect();
    let quick = if about["options"]["quick"] == true { " A QUICK LOOK: no basis for anything." } else { "" };
    vec![
        format!(
            "{}, pgmq {}, fsync on, messages of {} bytes, {} cores ({}), {}.",
            version.join(" "),
            word("/versions/pgmq"),
            word("/payload/text_bytes"),
            word("/machine/cores"),
            word("/machine/CPU"),
            word("/date").split('T').next().unwrap_or_default(),
        ),
        format!(
            "Medians of {} rounds of {} s in turns; thin lines: slowest to fastest round. bare: INSERT; SELECT + DELETE \
             by ctid. cargo xtask bench.{quick}",
            word("/options/rounds"),
            word("/options/seconds"),
        ),
    ]
}

fn draw_panel(svg: &mut String, panel: &Panel, x: f64, y: f64) {
    text(svg, x, y + 14.0, "start", "title", panel.title);
    text(svg, x, y + 31.0, "start", "small", panel.unit);
    if panel.is_over_time {
        draw_lines(svg, panel, x, y + TITLE_HEIGHT);
    } else {
        draw_bars(svg, panel, x, y + TITLE_HEIGHT);
    }
}

fn draw_bars(svg: &mut String, panel: &Panel, x: f64, y: f64) {
    let most = panel.figures.iter().flat_map(|figure| figure.rounds.iter().copied()).fold(0.0, f64::max);
    let step = tick_step(most);
    let end = (most / step).ceil() * step;
    let (left, width) = (x + NAME_WIDTH, PANEL_WIDTH - NAME_WIDTH - VALUE_WIDTH);
    let at = |value: f64| left + value / end * width;
    let bottom = y + panel.figures.len() as f64 * BAR_STEP;
    for tick in ticks(end, step) {
        line(svg, at(tick), y - 4.0, at(tick), bottom, "#dddddd", 1.0);
        text(svg, at(tick), bottom + 14.0, "middle", "small", &short(tick));
    }
    let several = panel.figures.iter().any(|figure| figure.variant != panel.figures[0].variant);
    for (index, figure) in panel.figures.iter().enumerate() {
        let Some(value) = figure.median() else { continue };
        let top = y + index as f64 * BAR_STEP;
        let middle = top + BAR_HEIGHT / 2.0;
        let name = match figure.system {
            ONE_STATEMENT => "1 statement",
            "LISTEN/NOTIFY" => "NOTIFY",
            other => other,
        };
        let name = if several { format!("{name} {}", figure.variant) } else { name.to_owned() };
        let class = if figure.system == "pg_queue" { "ours" } else { "" };
        text(svg, left - 6.0, middle + 4.0, "end", class, &name);
        let _ = writeln!(
            svg,
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{}\"/>",
            at(value) - left,
            colour(figure.system)
        );
        let least = figure.rounds.iter().copied().fold(f64::INFINITY, f64::min);
        let most = figure.rounds.iter().copied().fold(0.0, f64::max);
        line(svg, at(least), middle, at(most), middle, "#222222", 1.5);
        text(svg, at(most) + 5.0, middle + 4.0, "start", class, &shown(value));
    }
    line(svg, left, y - 4.0, left, bottom, "#222222", 1.0);
}

fn draw_lines(svg: &mut String, panel: &Panel, x: f64, y: f64) {
    let seconds = |figure: &Figure| -> f64 {
        let digits: String = figure.variant.chars().filter(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0.0)
    };
    let most = panel.figures.iter().filter_map(|figure| figure.median()).fold(0.0, f64::max);
    let last = panel.figures.iter().map(|figure| seconds(figure)).fold(1.0, f64::max);
    let step = tick_step(most);
    let end = (most / step).ceil() * step;
    let (left, width) = (x + 52.0, PANEL_WIDTH - 52.0 - NAME_WIDTH);
    let bottom = y + LINES_HEIGHT;
    let place = |second: f64, value: f64| (left + second / last * width, bottom - value / end * LINES_HEIGHT);
    for tick in ticks(end, step) {
        let (_, height) = place(0.0, tick);
        line(svg, left, height, left + width, height, "#dddddd", 1.0);
        text(svg, left - 6.0, height + 4.0, "end", "small", &short(tick));
    }
    let mut systems: Vec<&str> = Vec::new();
    for figure in &panel.figures {
        if !systems.contains(&figure.system) {
            systems.push(figure.system);
        }
        if figure.system == panel.figures[0].system {
            let (across, _) = place(seconds(figure), 0.0);
            text(svg, across, bottom + 14.0, "middle", "small", &format!("{:.0} s", seconds(figure)));
        }
    }
    let mut labels: Vec<(f64, &str)> = Vec::new();
    for system in &systems {
        let of_system = panel.figures.iter().filter(|figure| figure.system == *system);
        let points: Vec<(f64, f64)> =
            of_system.filter_map(|figure| Some(place(seconds(figure), figure.median()?))).collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2.5\"/>",
            path.join(" "),
            colour(system)
        );
        labels.extend(points.last().map(|(_, height)| (*height, *system)));
    }
    // Names that would lie on one another are moved up, from the lowest on.
    labels.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut lowest = bottom + 4.0;
    for (height, system) in labels {
        let at = (height + 4.0).min(lowest);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{at:.1}\" style=\"fill: {}; font-weight: bold\">{}</text>",
            left + width + 8.0,
            colour(system),
            escape(system)
        );
        lowest = at - 14.0;
    }
    line(svg, left, bottom, left + width, bottom, "#222222", 1.0);
}

/// A step of 1, 2 or 5 times a power of ten that makes about [`TICKS_MAX`] of `most`.
fn tick_step(most: f64) -> f64 {
    let rough = (most / TICKS_MAX).max(f64::MIN_POSITIVE);
    let power = 10_f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|by| by * power).find(|step| *step >= rough).unwrap_or(10.0 * power)
}

fn ticks(end: f64, step: f64) -> impl Iterator<Item = f64> {
    (0..=(end / step).round() as u32).map(move |tick| f64::from(tick) * step)
}

/// A round number, short: `50k`.
fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e3 => format!("{}k", v / 1e3),
        v => format!("{v}"),
    }
}

fn line(svg: &mut String, x1: f64, y1: f64, x2: f64, y2: f64, colour: &str, width: f64) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" stroke-width=\"{width}\"/>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, class: &str, words: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{}</text>",
        escape(words)
    );
}

fn escape(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        for (most, step) in [(16_000.0, 5_000.0), (370_000.0, 100_000.0), (900.0, 200.0), (1.0, 0.2)] {
            assert!((tick_step(most) - step).abs() < 1e-9, "{most}");
        }
        assert_eq!(ticks(15_000.0, 5_000.0).collect::<Vec<_>>(), [0.0, 5_000.0, 10_000.0, 15_000.0]);
        assert_eq!((short(50_000.0), short(2e6), short(200.0)), ("50k".into(), "2M".into(), "200".into()));
    }

    #[test]
    fn picture_shows_every_system_and_nothing_without_figures() {
        let mut report = Report::default();
        assert!(draw(&report, &Value::Null).is_none());
        for system in ["pg_queue", "pgmq"] {
            report.add("send", "8 clients", system, 1_000.0);
            report.add("snapshot", "after 0 s", system, 1_000.0);
            report.add("snapshot", "after 10 s", system, 900.0);
        }
        let svg = draw(&report, &Value::Null).unwrap_or_default();
        assert!(svg.contains(">pgmq</text>") && svg.contains("<polyline") && svg.ends_with("</svg>\n"));
    }
}
