//! The curve of accuracy against the share sent up, for a terminal and as SVG.

use std::fmt::Write;

use super::{Fit, Point, Promise};

/// Part of the share sent up that is shown, and of the accuracy.
struct Frame {
    right: f64,
    bottom: f64,
}

impl Frame {
    /// Shows the chosen point well inside, and the curve up to there.
    fn of(fit: &Fit, promise: Promise) -> Self {
        let chosen = fit.chosen.as_ref().map_or(0.0, |point| point.up);
        let wanted = match promise {
            Promise::MaxUp(most) => most,
            Promise::Accuracy(_) => 0.0,
        };
        let right = (chosen.max(wanted) * 2.5).clamp(0.2, 1.0);
        let shown = fit.curve.iter().filter(|point| point.up <= right).map(|point| point.accuracy);
        let wanted = match promise {
            Promise::Accuracy(wanted) => wanted,
            Promise::MaxUp(_) => 1.0,
        };
        let least = shown.fold(wanted, f64::min);
        // A whole percent below the least, so that no curve lies on the edge.
        Frame { right, bottom: (((least - 0.005) * 100.0).floor() / 100.0).clamp(0.0, 0.99) }
    }

    /// Place of a point, 0 to 1 from left to right and from bottom to top.
    fn place(&self, up: f64, accuracy: f64) -> Option<(f64, f64)> {
        let (x, y) = (up / self.right, (accuracy - self.bottom) / (1.0 - self.bottom));
        ((0.0..=1.0).contains(&x) && (0.0..=1.0).contains(&y)).then_some((x, y))
    }

    /// The line of the promise, between two places.
    fn promise(&self, promise: Promise) -> Option<((f64, f64), (f64, f64))> {
        Some(match promise {
            Promise::Accuracy(wanted) => (self.place(0.0, wanted)?, self.place(self.right, wanted)?),
            Promise::MaxUp(most) => (self.place(most, self.bottom)?, self.place(most, 1.0)?),
        })
    }
}

/// Columns and rows of the terminal's plot, without its labels.
const SIZE: (usize, usize) = (61, 13);

/// The curve in characters: `·` the curve, `┄` or `┆` the promise, `◆` the threshold chosen.
pub fn text(fit: &Fit, promise: Promise) -> String {
    let frame = Frame::of(fit, promise);
    let (columns, rows) = SIZE;
    let mut cells = vec![vec![' '; columns]; rows];
    let cell = |(x, y): (f64, f64)| {
        let at = |share: f64, cells: usize| (share * (cells - 1) as f64).round() as usize;
        (at(1.0 - y, rows), at(x, columns))
    };
    if let Some((from, to)) = frame.promise(promise) {
        let ((top, left), (bottom, right)) = (cell(to), cell(from));
        match promise {
            Promise::Accuracy(_) => cells[top][right..=left].fill('┄'),
            Promise::MaxUp(_) => cells[top..=bottom].iter_mut().for_each(|row| row[left] = '┆'),
        }
    }
    let mut put = |point: &Point, mark: char| {
        if let Some((row, column)) = frame.place(point.up, point.accuracy).map(cell) {
            cells[row][column] = mark;
        }
    };
    fit.curve.iter().filter(|point| point.kept > 0).for_each(|point| put(point, '·'));
    if let Ok(point) = &fit.chosen {
        put(point, '◆');
    }
    let mut text = "accuracy of the answers that stay on the device\n".to_owned();
    for (row, line) in cells.iter().enumerate() {
        let share = 1.0 - row as f64 / (rows - 1) as f64;
        let label = match row % 3 {
            0 => format!("{:.2} %", (frame.bottom + share * (1.0 - frame.bottom)) * 100.0),
            _ => String::new(),
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{label:>9} ┤{}", line.iter().collect::<String>().trim_end());
    }
    let _ = writeln!(text, "{:>9} └{}", "", "┬──────────────".repeat(4) + "┬");
    let _ = write!(text, "{:>11}", "");
    for tick in 0..5 {
        let _ = write!(text, "{:<15}", format!("{:.1} %", frame.right * f64::from(tick) * 25.0));
    }
    text.truncate(text.trim_end().len());
    text + "\n           share sent up\n"
}

/// Width and height of the picture and its margins: left, top, right, bottom.
const PICTURE: (f64, f64) = (640.0, 400.0);
const MARGINS: (f64, f64, f64, f64) = (70.0, 40.0, 20.0, 50.0);

/// The curve as an SVG picture.
pub fn svg(fit: &Fit, promise: Promise, title: &str) -> String {
    let frame = Frame::of(fit, promise);
    let ((width, height), (left, top, right, bottom)) = (PICTURE, MARGINS);
    let place = |(x, y): (f64, f64)| (left + x * (width - left - right), height - bottom - y * (height - top - bottom));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{left}\" y=\"22\" font-size=\"14\">{}</text>\n",
        escaped(title)
    );
    let line = |svg: &mut String, from, to, style: &str| {
        let ((x1, y1), (x2, y2)) = (place(from), place(to));
        let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>");
    };
    for tick in 0..=4 {
        let share = f64::from(tick) / 4.0;
        line(&mut svg, (0.0, share), (1.0, share), "stroke=\"#ddd\"");
        line(&mut svg, (share, 0.0), (share, 1.0), "stroke=\"#ddd\"");
        let (x, y) = (place((share, 0.0)).0, place((0.0, share)).1);
        let accuracy = (frame.bottom + share * (1.0 - frame.bottom)) * 100.0;
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.1} %</text>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{accuracy:.2} %</text>",
            height - bottom + 18.0,
            frame.right * share * 100.0,
            left - 8.0,
            y + 4.0
        );
    }
    if let Some((from, to)) = frame.promise(promise) {
        line(&mut svg, from, to, "stroke=\"#c60\" stroke-dasharray=\"6 4\"");
    }
    let kept = fit.curve.iter().filter(|point| point.kept > 0);
    let points = kept.filter_map(|point| frame.place(point.up, point.accuracy)).map(place);
    let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ =
        writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"#06c\" stroke-width=\"2\"/>", points.join(" "));
    if let Ok(point) = &fit.chosen
        && let Some((x, y)) = frame.place(point.up, point.accuracy).map(place)
    {
        let anchor = if x > width / 2.0 { "end" } else { "start" };
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"#c60\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">threshold {:.4}</text>",
            if anchor == "end" { x - 9.0 } else { x + 9.0 },
            y + 18.0,
            point.threshold
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">share sent up</text>\n\
         <text transform=\"translate(16 {:.1}) rotate(-90)\" text-anchor=\"middle\">accuracy on the device</text>\n</svg>",
        (left + width - right) / 2.0,
        height - 10.0,
        (top + height - bottom) / 2.0
    );
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit() -> Fit {
        let point = |threshold: f64, up: f64, accuracy: f64| {
            let kept = ((1.0 - up) * 1000.0).round() as usize;
            Point { threshold, kept, right: (kept as f64 * accuracy) as usize, up, accuracy }
        };
        let curve = vec![point(0.0, 0.0, 0.96), point(0.6, 0.04, 0.98), point(0.8, 0.1, 0.99), point(0.99, 0.6, 1.0)];
        Fit { temperature: 1.0, fitted: 250, tested: 1000, chosen: Ok(curve[1]), curve }
    }

    #[test]
    fn the_threshold_and_the_promise_are_in_both() {
        for promise in [Promise::Accuracy(0.97), Promise::MaxUp(0.05)] {
            let (text, svg) = (text(&fit(), promise), svg(&fit(), promise, "a & b"));
            let mark = if promise == Promise::MaxUp(0.05) { '┆' } else { '┄' };
            assert!(text.contains('◆') && text.contains(mark) && text.contains('·'), "{text}");
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
            assert!(svg.contains("a &amp; b") && svg.contains("stroke-dasharray") && svg.contains("<circle"), "{svg}");
            assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
        }
    }

    #[test]
    fn nothing_chosen_is_plotted_too() {
        let fit = Fit { chosen: Err(super::super::Broken::TooSmall { cases: 1, needed: 9 }), ..fit() };
        assert!(!text(&fit, Promise::Accuracy(0.97)).contains('◆'));
        assert!(!svg(&fit, Promise::Accuracy(0.97), "").contains("<circle"));
    }
}
