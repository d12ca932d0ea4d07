//! Writes plots as SVG. The colours follow the reader's colour scheme, light or dark.

use crate::{
    measure::Spread,
    row::{Kind, Plot, Scale, Series},
    table::number,
};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;
const BOTTOM: f64 = 50.0;
/// The space below the title; each series has a legend line below that.
const TOP: f64 = 44.0;
const LEGEND: f64 = 18.0;
const BAR: f64 = 26.0;
/// The position and the greatest length of bars, with room for the figures.
const BAR_LEFT: f64 = 260.0;
const BAR_RIGHT: f64 = 100.0;

/// Blue, orange and green that contrast with white and black.
const STYLE: &str = "<style>text{font:13px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:15px}\
    .axis{stroke:#777}.grid{stroke:#888;stroke-opacity:.25}.s0{stroke:#2a78d6;fill:#2a78d6}.s1{stroke:#d9730d;fill:#d9730d}\
    .s2{stroke:#2e9e5b;fill:#2e9e5b}polyline{fill:none!important;stroke-width:2}\
    @media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#999}}</style>";

/// Returns the contents of the SVG file.
pub(crate) fn svg(plot: &Plot) -> String {
    let (height, inside) = match &plot.kind {
        Kind::Curves { size, sizes, figure, figures, series } => {
            let top = TOP + LEGEND * series.len() as f64;
            (HEIGHT, curves((size, *sizes), (figure, *figures), series, top))
        }
        Kind::Bars { figure, bars } => (TOP + BAR * bars.len() as f64 + BOTTOM, self::bars(figure, bars)),
    };
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\">\n<title>{title}</title>\n{STYLE}\n{}\n{inside}</svg>\n",
        words("title", LEFT, 24.0, "start", plot.title),
        title = escaped(plot.title),
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn words(class: &str, x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escaped(text))
}

fn line(class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) -> String {
    format!("<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>\n")
}

/// Maps values to positions between 0 and 1.
struct Axis {
    scale: Scale,
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Axis {
    fn of(scale: Scale, values: impl Iterator<Item = f64> + Clone) -> Self {
        let least = values.clone().fold(f64::INFINITY, f64::min);
        let most = values.fold(f64::NEG_INFINITY, f64::max);
        match scale {
            Scale::Linear => {
                // Starts at zero, since small differences would otherwise look large.
                let step = step((most.max(0.0) - least.min(0.0)).max(1e-9));
                let (first, last) = ((least.min(0.0) / step).floor() as i64, (most.max(step) / step).ceil() as i64);
                let ticks: Vec<f64> = (first..=last).map(|number| number as f64 * step).collect();
                Self { scale, from: first as f64 * step, to: last as f64 * step, ticks }
            }
            Scale::Logarithmic => {
                let (first, last) = (least.max(1e-9).log10().floor() as i32, most.max(1e-9).log10().ceil() as i32);
                let last = last.max(first + 1);
                let ticks = (first..=last).map(|power| 10f64.powi(power)).collect();
                Self { scale, from: f64::from(first), to: f64::from(last), ticks }
            }
        }
    }

    fn place(&self, value: f64) -> f64 {
        let value = match self.scale {
            Scale::Linear => value,
            Scale::Logarithmic => value.max(1e-9).log10(),
        };
        ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0)
    }
}

/// Returns 1, 2 or 5 times a power of ten, such that about five steps make up a range.
fn step(range: f64) -> f64 {
    let power = 10f64.powf((range / 5.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    steps.into_iter().find(|step| range / step <= 6.0).unwrap_or(10.0 * power)
}

/// Returns the label of a tick.
fn tick(value: f64) -> String {
    if value == 0.0 || value.abs() >= 1.0 && value.fract().abs() < 1e-9 {
        let text = number(value.abs().max(100.0));
        return if value.abs() < 100.0 {
            format!("{value:.0}")
        } else if value < 0.0 {
            format!("-{text}")
        } else {
            text
        };
    }
    format!("{}", (value * 1e6).round() / 1e6)
}

fn curves((size, sizes): (&str, Scale), (figure, figures): (&str, Scale), series: &[Series], top: f64) -> String {
    let points = || series.iter().flat_map(|series| &series.points);
    if points().next().is_none() {
        return words("", LEFT, top, "start", "no measurements");
    }
    let across = Axis::of(sizes, points().map(|(size, _)| *size));
    let up = Axis::of(figures, points().flat_map(|(_, spread)| [spread.low, spread.median, spread.high]));
    let x = |value| LEFT + across.place(value) * (WIDTH - LEFT - RIGHT);
    let y = |value| HEIGHT - BOTTOM - up.place(value) * (HEIGHT - BOTTOM - top);
    let mut text = String::new();
    for value in &up.ticks {
        text += &line("grid", (LEFT, y(*value)), (WIDTH - RIGHT, y(*value)));
        text += &words("", LEFT - 8.0, y(*value) + 4.0, "end", &tick(*value));
    }
    for value in &across.ticks {
        text += &line("grid", (x(*value), top), (x(*value), HEIGHT - BOTTOM));
        // The last label must not extend over the edge.
        let anchor = if across.place(*value) < 1.0 { "middle" } else { "end" };
        text += &words("", x(*value), HEIGHT - BOTTOM + 18.0, anchor, &tick(*value));
    }
    text += &line("axis", (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM));
    text += &line("axis", (LEFT, top), (LEFT, HEIGHT - BOTTOM));
    text += &words("", WIDTH - RIGHT, HEIGHT - 12.0, "end", size);
    text += &words("", LEFT, HEIGHT - 12.0, "start", &format!("↑ {figure}; bars are quartiles"));
    for (number, Series { name, points }) in series.iter().enumerate() {
        let at = TOP + LEGEND * number as f64;
        text += &format!("<g class=\"s{number}\">{}", line("", (LEFT, at - 4.0), (LEFT + 22.0, at - 4.0)));
        let places = points.iter().map(|(size, spread)| format!("{:.1},{:.1}", x(*size), y(spread.median)));
        text += &format!("<polyline points=\"{}\"/>\n", places.collect::<Vec<_>>().join(" "));
        for (size, Spread { median, low, high, .. }) in points {
            text += &line("", (x(*size), y(*low)), (x(*size), y(*high)));
            text += &format!("<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\"/>\n", x(*size), y(*median));
        }
        text += "</g>\n";
        text += &words("", LEFT + 30.0, at, "start", name);
    }
    text
}

fn bars(figure: &str, bars: &[(String, Spread)]) -> String {
    if bars.is_empty() {
        return words("", LEFT, TOP, "start", "no measurements");
    }
    let axis = Axis::of(Scale::Logarithmic, bars.iter().flat_map(|(_, spread)| [spread.low, spread.high]));
    let x = |value| BAR_LEFT + axis.place(value) * (WIDTH - BAR_LEFT - BAR_RIGHT);
    let bottom = TOP + BAR * bars.len() as f64;
    let mut text = String::new();
    for value in &axis.ticks {
        text += &line("grid", (x(*value), TOP), (x(*value), bottom));
        text += &words("", x(*value), bottom + 18.0, "middle", &tick(*value));
    }
    text += &words("", WIDTH - RIGHT, bottom + 38.0, "end", &format!("{figure} (logarithmic)"));
    for (place, (name, spread)) in bars.iter().enumerate() {
        let top = TOP + BAR * place as f64;
        text += &words("", BAR_LEFT - 8.0, top + 17.0, "end", name);
        let length = x(spread.median) - BAR_LEFT;
        text += &format!(
            "<rect class=\"s0\" x=\"{BAR_LEFT}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"{:.1}\"/>\n",
            top + 5.0,
            BAR - 10.0
        );
        text += &words("", x(spread.median) + 6.0, top + 17.0, "start", &number(spread.median));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Axis, step, svg, tick};
    use crate::{
        measure::Spread,
        row::{Kind, Plot, Scale, Series},
    };

    fn spread(median: f64) -> Spread {
        Spread { median, low: median * 0.9, high: median * 1.1, runs: 5 }
    }

    #[test]
    fn linear_axes_begin_at_zero_and_have_round_steps() {
        assert_eq!([7.0, 100.0, 31.0, 0.04].map(step), [2.0, 20.0, 10.0, 0.01]);
        let axis = Axis::of(Scale::Linear, [10.0, 100.0].into_iter());
        assert_eq!(axis.ticks, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert!((axis.place(50.0) - 0.5).abs() < 1e-9);
        let axis = Axis::of(Scale::Linear, [-10.0, 30.0].into_iter());
        assert!(axis.from <= -10.0 && axis.to >= 30.0);
    }

    #[test]
    fn logarithmic_axes_have_powers_of_ten() {
        let axis = Axis::of(Scale::Logarithmic, [3.0, 700.0].into_iter());
        assert_eq!(axis.ticks, [1.0, 10.0, 100.0, 1000.0]);
        assert!((axis.place(10.0) - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(Axis::of(Scale::Logarithmic, [1.0].into_iter()).ticks, [1.0, 10.0]);
    }

    #[test]
    fn tick_labels_are_as_short_as_possible() {
        assert_eq!([0.0, 5.0, 20.0, 1000.0, -50.0, 0.25].map(tick), ["0", "5", "20", "1,000", "-50", "0.25"]);
    }

    #[test]
    fn plots_escape_names_and_have_every_point() {
        let points = vec![(1.0, spread(10.0)), (1000.0, spread(12.0))];
        let series = vec![Series { name: "a < b & c".to_owned(), points }];
        let (sizes, figures) = (Scale::Logarithmic, Scale::Linear);
        let kind = Kind::Curves { size: "targets", sizes, figure: "ns", figures, series };
        let text = svg(&Plot { name: "x", title: "t", kind });
        assert!(text.contains("a &lt; b &amp; c") && !text.contains("a < b"), "{text}");
        assert_eq!(text.matches("<circle").count(), 2);
        assert!(text.contains("prefers-color-scheme:dark"));
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        let bars = vec![("strace".to_owned(), spread(10_000.0)), ("none".to_owned(), spread(150.0))];
        let text = svg(&Plot { name: "x", title: "t", kind: Kind::Bars { figure: "ns", bars } });
        assert_eq!(text.matches("<rect").count(), 2);
        assert!(text.contains(">10,000<"));
    }

    #[test]
    fn plot_without_points_says_so() {
        let kind = Kind::Bars { figure: "ns", bars: Vec::new() };
        assert!(svg(&Plot { name: "x", title: "t", kind }).contains("no measurements"));
    }
}
