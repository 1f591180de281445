//! A drawing of the result over the message size, as SVG: two logarithmic axes, one line for each
//! link and baseline.

use std::fmt::Write;

use crate::rows::Row;
use crate::table;
use crate::units::show_size;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 560.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 210.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 62.0;
/// Room for a label like `64 KiB`.
const SIZE_LABEL_WIDTH: f64 = 54.0;

/// Colours that stay apart for most kinds of colour blindness (Okabe and Ito, 2008).
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a00"];

/// What the vertical axis shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Half a round trip, median.
    Microseconds,
    /// 10⁹ bytes a second.
    Gigabytes,
}

struct Series {
    name: String,
    dashed: bool,
    points: Vec<(f64, f64)>,
}

/// Draws the rows. Those without a figure, or of zero bytes, do not appear.
pub fn render(rows: &[Row], axis: Axis) -> String {
    let series = series(rows);
    let (title, label) = match axis {
        Axis::Microseconds => ("Latency over message size", "half a round trip, median, µs"),
        Axis::Gigabytes => ("Bandwidth over message size", "GB/s (10⁹ bytes a second)"),
    };
    let x = Scale::of(series.iter().flat_map(|s| &s.points).map(|p| p.0), 2.0, LEFT, WIDTH - RIGHT);
    let y =
        Scale::of(series.iter().flat_map(|s| &s.points).map(|p| p.1), 10.0, HEIGHT - BOTTOM, TOP);
    let mut svg = String::new();
    let _ = write!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13">
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="{LEFT}" y="28" font-size="17" font-weight="bold">{title}</text>
"##
    );
    draw_frame(&mut svg, label);
    draw_values(&mut svg, &y);
    draw_sizes(&mut svg, &x, &series);
    let mut used = [0, 0];
    for (index, line) in series.iter().enumerate() {
        let kind = &mut used[usize::from(line.dashed)];
        draw_series(&mut svg, line, COLOURS[*kind % COLOURS.len()], index, &x, &y);
        *kind += 1;
    }
    svg.push_str("</svg>\n");
    svg
}

fn series(rows: &[Row]) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows {
        let Some(value) = row.headline().filter(|value| *value > 0.0) else {
            continue;
        };
        if row.size_bytes == 0 {
            continue;
        }
        let dashed = row.row == "baseline";
        let name = if dashed {
            row.transport.clone()
        } else {
            format!("{} {}", table::path(row), row.wake)
        };
        let point = (row.size_bytes as f64, value);
        match series.iter_mut().find(|line| line.name == name && line.dashed == dashed) {
            Some(line) => line.points.push(point),
            None => series.push(Series { name, dashed, points: vec![point] }),
        }
    }
    for line in &mut series {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    series
}

/// A logarithmic axis over whole powers of its base.
struct Scale {
    base: f64,
    first: i32,
    last: i32,
    from: f64,
    to: f64,
}

impl Scale {
    fn of(values: impl Iterator<Item = f64>, base: f64, from: f64, to: f64) -> Scale {
        let (mut low, mut high) = (f64::INFINITY, 0.0f64);
        for value in values {
            low = low.min(value);
            high = high.max(value);
        }
        if high == 0.0 {
            (low, high) = (1.0, base);
        }
        // Tolerates the rounding of logarithms at exact powers.
        let first = (low.log(base) + 1e-9).floor() as i32;
        let last = ((high.log(base) - 1e-9).ceil() as i32).max(first + 1);
        Scale { base, first, last, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let span = f64::from(self.last - self.first);
        self.from + (value.log(self.base) - f64::from(self.first)) / span * (self.to - self.from)
    }

    /// The powers that get a line and a label: at most a dozen.
    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        let step = ((self.last - self.first) as usize).div_ceil(12).max(1);
        (self.first..=self.last).step_by(step).map(|power| self.base.powi(power))
    }
}

fn draw_frame(svg: &mut String, label: &str) {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let _ = writeln!(
        svg,
        r##"<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#404040"/>
<text x="{:.1}" y="{:.1}" text-anchor="middle">message size</text>
<text transform="translate(20 {:.1}) rotate(-90)" text-anchor="middle">{label}</text>"##,
        (LEFT + right) / 2.0,
        HEIGHT - 16.0,
        (TOP + bottom) / 2.0,
    );
}

/// A line and a label at each power of ten, and faint lines between them, so that a reader sees
/// that the axis is logarithmic.
fn draw_values(svg: &mut String, y: &Scale) {
    let right = WIDTH - RIGHT;
    for value in y.ticks() {
        let at = y.at(value);
        let text = tick(value);
        let _ = writeln!(
            svg,
            r##"<line x1="{LEFT}" x2="{right}" y1="{at:.1}" y2="{at:.1}" stroke="#d0d0d0"/><text x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"##,
            LEFT - 8.0,
            at + 4.5,
        );
        let highest = y.base.powi(y.last);
        for minor in (2..10).map(|n| value * f64::from(n)).filter(|minor| *minor < highest) {
            let at = y.at(minor);
            let _ = writeln!(
                svg,
                r##"<line x1="{LEFT}" x2="{right}" y1="{at:.1}" y2="{at:.1}" stroke="#f1f1f1"/>"##
            );
        }
    }
}

/// A line and a label at each size that was measured, as far as there is room.
fn draw_sizes(svg: &mut String, x: &Scale, series: &[Series]) {
    let bottom = HEIGHT - BOTTOM;
    let mut sizes: Vec<f64> = series.iter().flat_map(|s| &s.points).map(|p| p.0).collect();
    sizes.sort_by(f64::total_cmp);
    let mut last = f64::NEG_INFINITY;
    for size in sizes {
        let at = x.at(size);
        if at - last < SIZE_LABEL_WIDTH {
            continue;
        }
        last = at;
        let text = show_size(size as usize);
        let _ = writeln!(
            svg,
            r##"<line y1="{TOP}" y2="{bottom}" x1="{at:.1}" x2="{at:.1}" stroke="#e4e4e4"/><text x="{at:.1}" y="{:.1}" text-anchor="middle">{text}</text>"##,
            bottom + 20.0,
        );
    }
}

fn draw_series(svg: &mut String, line: &Series, colour: &str, index: usize, x: &Scale, y: &Scale) {
    let dash = if line.dashed { r#" stroke-dasharray="6 4""# } else { "" };
    let points: Vec<String> =
        line.points.iter().map(|p| format!("{:.1},{:.1}", x.at(p.0), y.at(p.1))).collect();
    let _ = writeln!(
        svg,
        r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>"#,
        points.join(" ")
    );
    for point in &line.points {
        let _ = writeln!(
            svg,
            r#"<circle cx="{:.1}" cy="{:.1}" r="3.5" fill="{colour}"/>"#,
            x.at(point.0),
            y.at(point.1)
        );
    }
    let (left, at) = (WIDTH - RIGHT + 20.0, TOP + 12.0 + index as f64 * 22.0);
    let _ = writeln!(
        svg,
        r#"<line x1="{left}" x2="{:.1}" y1="{at:.1}" y2="{at:.1}" stroke="{colour}" stroke-width="2"{dash}/><circle cx="{:.1}" cy="{at:.1}" r="3.5" fill="{colour}"/><text x="{:.1}" y="{:.1}">{}</text>"#,
        left + 30.0,
        left + 15.0,
        left + 38.0,
        at + 4.5,
        escape(&line.name),
    );
}

fn tick(value: f64) -> String {
    if value >= 1.0 { format!("{value:.0}") } else { format!("{value}") }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::RowFigures;
    use crate::stats::Percentiles;

    fn row(kind: &'static str, transport: &str, size_bytes: usize, p50: f64) -> Row {
        Row {
            program: "pingpong",
            row: kind,
            transport: transport.to_owned(),
            memory: "host",
            wake: "spin",
            size_bytes,
            figures: RowFigures::Latency {
                iters: 1,
                half_rtt_us: Percentiles { p50: Some(p50), ..Percentiles::default() },
                cpu_us_per_message: None,
            },
        }
    }

    #[test]
    fn one_line_and_one_legend_entry_for_each_link_and_baseline() {
        let rows = [
            row("thalweg", "shm", 8, 0.2),
            row("thalweg", "shm", 1 << 20, 80.0),
            row("thalweg", "tcp", 8, 5.0),
            row("baseline", "raw-tcp", 8, 7.0),
        ];
        let svg = render(&rows, Axis::Microseconds);
        assert_eq!(svg.matches("<polyline").count(), 3);
        assert_eq!(svg.matches("stroke-dasharray").count(), 2);
        for word in ["shm spin", "tcp spin", ">raw-tcp<", "message size", "1 MiB", ">0.1<", ">100<"]
        {
            assert!(svg.contains(word), "{word}");
        }
    }

    #[test]
    fn every_point_lies_inside_the_axes() {
        let x = Scale::of([8.0, 8388608.0].into_iter(), 2.0, LEFT, WIDTH - RIGHT);
        assert!((x.at(8.0) - LEFT).abs() < 1e-6);
        assert!((x.at(8388608.0) - (WIDTH - RIGHT)).abs() < 1e-6);
        assert!(x.ticks().count() <= 13);
    }

    #[test]
    fn nothing_to_draw_is_still_a_drawing() {
        let svg = render(&[row("thalweg", "shm", 0, 1.0)], Axis::Gigabytes);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
