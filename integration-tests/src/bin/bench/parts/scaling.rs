//! What grows with a policy's rules, its targets and its networks, and what does not.

use super::{call, connections};
use crate::{
    guard::Ground,
    measure::{self, Spread},
    peers,
    row::{Budget, Findings, Kind, Line, Plot, Scale, Series, added, whole},
    scene::{Arm, Comparison, Condition, Place, Samples, Scene},
    trouble::Result,
    work::Work,
};

const RULES: [usize; 4] = [1, 4, 16, 64];
const TARGETS: [usize; 4] = [1, 10, 100, 1000];
const PREFIXES: [usize; 5] = [1, 10, 100, 1000, 10_000];

/// What the rule that decides sets, in every size.
const SET: &str = "set = { TCP_NODELAY = true }";

/// One dimension in which a policy can be large.
struct Dimension {
    part: &'static str,
    title: &'static str,
    sizes: &'static [usize],
    condition: fn(usize) -> Condition,
}

pub(crate) fn rules(ground: &Ground, findings: &mut Findings) -> Result<()> {
    let title = "Cost by rules of a policy, of which the last decides";
    Dimension { part: "rules", title, sizes: &RULES, condition: of_rules }.measure(ground, findings)
}

pub(crate) fn targets(ground: &Ground, findings: &mut Findings) -> Result<()> {
    let title = "Cost by targets of a policy, each a cgroup";
    Dimension { part: "targets", title, sizes: &TARGETS, condition: of_targets }.measure(ground, findings)
}

pub(crate) fn prefixes(ground: &Ground, findings: &mut Findings) -> Result<()> {
    let title = "Cost by networks in one match";
    Dimension { part: "prefixes", title, sizes: &PREFIXES, condition: of_prefixes }.measure(ground, findings)
}

/// So many rules, of which all but the last are about other ports.
fn of_rules(count: usize) -> Condition {
    let others = (1..count).map(|number| {
        format!(
            "[[rule]]\nmatch = {{ remote_port = {number} }}\nset = {{ TCP_NODELAY = false, TCP_KEEPCNT = {number} }}\n"
        )
    });
    peers::policy(&others.chain([format!("[[rule]]\n{SET}")]).collect::<String>())
}

fn of_targets(count: usize) -> Condition {
    Condition { targets: Some(count), ..peers::policy(&format!("[[rule]]\n{SET}")) }
}

/// So many networks, one of which is the peer's.
fn of_prefixes(count: usize) -> Condition {
    let other = |number: usize| format!(", \"{}.{}.{}.0/24\"", 11 + number / 65_536, number / 256 % 256, number % 256);
    let others: String = (1..count).map(other).collect();
    peers::policy(&format!("[[rule]]\nmatch = {{ remote = [\"127.0.0.0/8\"{others}] }}\n{SET}"))
}

impl Dimension {
    fn measure(&self, ground: &Ground, findings: &mut Findings) -> Result<()> {
        let samples = Comparison { rounds: 11, millis: 60, turns: 5, scenes: self.scenes() }.run(ground)?;
        findings.add(self.part, &samples, &self.lines());
        findings.plots.push(self.plot(&samples));
        Ok(())
    }

    fn arms() -> Vec<Arm> {
        // A call on an option that is governed, without a conflict. What has no peer is not of these networks.
        let work = Work::Set { call: call(libc::SOL_TCP, libc::TCP_NODELAY, 1), errno: 0 };
        vec![connections::outbound(), connections::accepted(), Arm { name: "set", place: Place::Inside, work }]
    }

    fn scenes(&self) -> Vec<Scene> {
        let scene = |name, condition| Scene { name, condition, setup: Vec::new(), arms: Self::arms() };
        let sizes = self.sizes.iter().map(|size| scene(format!("{}-{size}", self.part), (self.condition)(*size)));
        [scene("none".to_owned(), peers::nothing())].into_iter().chain(sizes).collect()
    }

    fn lines(&self) -> Vec<Line> {
        let Self { part, sizes, .. } = self;
        let mut lines = Vec::new();
        for (arm, says) in [("outbound", "connecting"), ("accepted", "accepting"), ("set", "setsockopt")] {
            for size in &sizes[1..] {
                let (large, small) = (format!("{part}-{size}/{arm}"), format!("{part}-1/{arm}"));
                let line =
                    Line::new(format!("{says}, {size} {part}"), whole(large.clone()), "with 1", whole(small.clone()));
                // The budgets are about the largest.
                let has_budget = *part != "prefixes" && Some(size) == sizes.last();
                lines.push(if has_budget { line.budget(Budget::AtMost(1.2)) } else { line });
                if Some(size) == sizes.last() {
                    let none = format!("none/{arm}");
                    let more = added(large, none.clone());
                    lines.push(Line::new(
                        format!("{says}, {size} {part}: added"),
                        more,
                        "with 1: added",
                        added(small, none),
                    ));
                }
            }
        }
        lines
    }

    fn plot(&self, samples: &Samples) -> Plot {
        let added = |arm: &str, size: usize| {
            let of = samples.of(&format!("{}-{size}/{arm}", self.part)).ok()?;
            Spread::of(&measure::differences(of, samples.of(&format!("none/{arm}")).ok()?))
        };
        let series =
            [("outbound", "a connection, outbound"), ("accepted", "a connection, accepted"), ("set", "a setsockopt")];
        let series = series.into_iter().map(|(arm, name)| {
            let points = self.sizes.iter().filter_map(|size| Some((*size as f64, added(arm, *size)?)));
            Series { name: name.to_owned(), points: points.collect() }
        });
        let (figure, figures) = ("nanoseconds added", Scale::Linear);
        let (sizes, series) = (Scale::Logarithmic, series.collect());
        let kind = Kind::Curves { size: self.part, sizes, figure, figures, series };
        Plot { name: self.part, title: self.title, kind }
    }
}
