//! The result as people read it: one line a row, with the ratio to what the bare system costs.

use crate::rows::{Row, RowFigures};
use crate::units::{show_figure, show_size};

/// Up to this size a message is compared with the baselines that carry one cache line.
const LINE_BYTES: usize = 64;

/// Lays the rows out. `single_copy`: whether `process_vm_readv` was allowed.
pub fn render(rows: &[Row], single_copy: bool) -> String {
    let mut lines: Vec<Vec<String>> = vec![heading(rows)];
    let mut last_size = None;
    let mut sorted: Vec<&Row> = rows.iter().collect();
    sorted.sort_by_key(|row| row.size_bytes);
    for row in sorted {
        if last_size.is_some_and(|size| size != row.size_bytes) {
            lines.push(Vec::new());
        }
        let size = match last_size {
            Some(size) if size == row.size_bytes => String::new(),
            _ => show_size(row.size_bytes),
        };
        last_size = Some(row.size_bytes);
        lines.push(line(size, row, rows, single_copy));
    }
    align(&lines)
}

fn heading(rows: &[Row]) -> Vec<String> {
    let columns: &[&str] = match rows.first().map(|row| &row.figures) {
        Some(RowFigures::Stream { .. }) => {
            &["message", "path", "wake", "window", "GB/s", "messages/s", "beside the bare system"]
        }
        _ => &["message", "path", "wake", "p50 µs", "p99 µs", "CPU µs", "beside the bare system"],
    };
    columns.iter().map(ToString::to_string).collect()
}

fn line(size: String, row: &Row, rows: &[Row], single_copy: bool) -> Vec<String> {
    let mut cells = vec![size, path(row), row.wake.replace("none", "–")];
    match &row.figures {
        RowFigures::Latency { half_rtt_us, cpu_us_per_message, .. } => {
            cells.extend([half_rtt_us.p50, half_rtt_us.p99, *cpu_us_per_message].map(figure));
        }
        RowFigures::Stream { window, gb_per_s, messages_per_s, .. } => {
            cells.push(window.to_string());
            cells.push(figure(*gb_per_s));
            cells.push(messages_per_s.map_or("–".to_owned(), rate));
        }
    }
    cells.push(comparison(row, rows, single_copy).unwrap_or_default());
    cells
}

fn figure(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), show_figure)
}

fn rate(per_second: f64) -> String {
    match per_second {
        m if m >= 1e6 => format!("{} M", show_figure(m / 1e6)),
        k if k >= 1e3 => format!("{} k", show_figure(k / 1e3)),
        one => show_figure(one),
    }
}

/// Name of a row: `shm`, `shm loaned`, `(raw-tcp)`.
pub fn path(row: &Row) -> String {
    match (row.row, row.memory) {
        ("baseline", _) => format!("({})", row.transport),
        (_, "loaned") => format!("{} loaned", row.transport),
        _ => row.transport.clone(),
    }
}

/// The ratio to the bare system's way of doing the same: of times for latencies (lower is better),
/// of rates for streams (higher is better).
fn comparison(row: &Row, rows: &[Row], single_copy: bool) -> Option<String> {
    if row.row == "baseline" {
        return None;
    }
    let (other, name) = reference(row, rows, single_copy)?;
    let pick = |row: &Row| match row.figures {
        RowFigures::Stream { messages_per_s, .. } => messages_per_s,
        RowFigures::Latency { .. } => row.headline(),
    };
    let ratio = pick(row)? / pick(other)?;
    ratio.is_finite().then(|| format!("{ratio:.2} × {name}"))
}

fn reference<'a>(row: &Row, rows: &'a [Row], single_copy: bool) -> Option<(&'a Row, String)> {
    let small = row.size_bytes <= LINE_BYTES;
    let stream = matches!(row.figures, RowFigures::Stream { .. });
    if row.memory == "loaned" && !small {
        if stream {
            // A rate of loans says how often memory changes hands, whatever its size.
            return None;
        }
        let same = |other: &&Row| {
            other.row == row.row
                && other.memory == row.memory
                && other.transport == row.transport
                && other.wake == row.wake
                && other.size_bytes <= LINE_BYTES
        };
        return rows.iter().find(same).map(|r| (r, format!("{} loaned", show_size(r.size_bytes))));
    }
    let names: &[&str] = match (row.transport.as_str(), small, stream) {
        ("tcp", ..) => &["raw-tcp"],
        ("ucx", ..) => &["ucx-e"],
        ("verbs", _, true) => &["ib-write-bw"],
        ("verbs", _, false) => &["ib-send-lat"],
        ("shm", true, true) => &["ring"],
        ("shm", true, false) if row.wake == "park" => &["eventfd"],
        ("shm", true, false) => &["cacheline"],
        ("shm", false, _) if single_copy => &["cma", "memcpy"],
        ("shm", false, _) => &["memcpy"],
        _ => &[],
    };
    let find = |name: &&str| {
        rows.iter().find(|other| {
            let size = other.size_bytes == row.size_bytes || (small && other.size_bytes <= 8);
            other.row == "baseline" && other.transport == *name && size
        })
    };
    names.iter().find_map(find).map(|other| (other, other.transport.clone()))
}

/// Columns as wide as they must be: words to the left, figures to the right.
fn align(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (column, cell) in line.iter().enumerate() {
            let space = widths[column] - cell.chars().count();
            let left = column < 3 || column + 1 == columns;
            let (before, after) = if left { (0, space) } else { (space, 0) };
            row.push_str(&" ".repeat(before));
            row.push_str(cell);
            row.push_str(&" ".repeat(after + 3));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Percentiles;

    fn row(kind: &'static str, transport: &str, wake: &'static str, size: usize, p50: f64) -> Row {
        Row {
            program: "pingpong",
            row: kind,
            transport: transport.to_owned(),
            memory: "host",
            wake,
            size_bytes: size,
            figures: RowFigures::Latency {
                iters: 1,
                half_rtt_us: Percentiles { p50: Some(p50), ..Percentiles::default() },
                cpu_us_per_message: None,
            },
        }
    }

    #[test]
    fn each_row_stands_beside_its_own_baseline() {
        let rows = [
            row("thalweg", "shm", "spin", 8, 0.3),
            row("thalweg", "shm", "park", 8, 8.0),
            row("thalweg", "tcp", "park", 8, 9.0),
            row("thalweg", "shm", "spin", 1 << 20, 100.0),
            row("baseline", "cacheline", "spin", 8, 0.2),
            row("baseline", "eventfd", "park", 8, 4.0),
            row("baseline", "raw-tcp", "park", 8, 10.0),
            row("baseline", "cma", "none", 1 << 20, 80.0),
        ];
        let text = render(&rows, true);
        for expected in ["1.50 × cacheline", "2.00 × eventfd", "0.90 × raw-tcp", "1.25 × cma"] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
        assert!(!render(&rows, false).contains("× cma"));
    }

    #[test]
    fn columns_line_up() {
        let rows = [row("thalweg", "shm", "spin", 8, 0.3), row("thalweg", "tcp", "park", 8, 12.0)];
        let text = render(&rows, true);
        let column = |line: &str, what: &str| {
            line.find(what).map(|at| line[..at].chars().count() + what.chars().count())
        };
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(column(lines[1], "0.300"), column(lines[2], "12.0"));
    }
}
