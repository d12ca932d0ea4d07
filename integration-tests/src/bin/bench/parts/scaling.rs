//! How costs grow with the number of rules, targets and networks of a policy.

use super::{call, connections};
use crate::{
    conditions,
    error::Result,
    guard::Workspace,
    measure::{self, Spread},
    row::{Budget, Findings, Kind, Line, Plot, Scale, Series, added, total},
    scene::{Arm, Comparison, Condition, Placement, Samples, Scene},
    work::Work,
};

const RULES: [usize; 4] = [1, 4, 16, 64];
const TARGETS: [usize; 4] = [1, 10, 100, 1000];
const PREFIXES: [usize; 5] = [1, 10, 100, 1000, 10_000];

/// The setting of the deciding rule, in every size.
const SET: &str = "set = { TCP_NODELAY = true }";

/// A dimension in which a policy can be large.
struct Dimension {
    part: &'static str,
    title: &'static str,
    sizes: &'static [usize],
    condition: fn(usize) -> Condition,
}

pub(crate) fn rules(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let title = "Cost by number of rules; the last rule decides";
    Dimension { part: "rules", title, sizes: &RULES, condition: of_rules }.measure(ground, findings)
}

pub(crate) fn targets(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let title = "Cost by number of targets, each a cgroup";
    Dimension { part: "targets", title, sizes: &TARGETS, condition: of_targets }.measure(ground, findings)
}

pub(crate) fn prefixes(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let title = "Cost by number of networks in one match";
    Dimension { part: "prefixes", title, sizes: &PREFIXES, condition: of_prefixes }.measure(ground, findings)
}

/// Returns a policy of `count` rules, of which all but the last match other ports.
fn of_rules(count: usize) -> Condition {
    let others = (1..count).map(|number| {
        format!(
            "[[rule]]\nmatch = {{ remote_port = {number} }}\nset = {{ TCP_NODELAY = false, TCP_KEEPCNT = {number} }}\n"
        )
    });
    conditions::policy(&others.chain([format!("[[rule]]\n{SET}")]).collect::<String>())
}

fn of_targets(count: usize) -> Condition {
    Condition { targets: Some(count), ..conditions::policy(&format!("[[rule]]\n{SET}")) }
}

/// Returns a policy that matches `count` networks, one of which contains the peer.
fn of_prefixes(count: usize) -> Condition {
    let other = |number: usize| format!(", \"{}.{}.{}.0/24\"", 11 + number / 65_536, number / 256 % 256, number % 256);
    let others: String = (1..count).map(other).collect();
    conditions::policy(&format!("[[rule]]\nmatch = {{ remote = [\"127.0.0.0/8\"{others}] }}\n{SET}"))
}

impl Dimension {
    fn measure(&self, ground: &Workspace, findings: &mut Findings) -> Result<()> {
        let samples = Comparison { rounds: 11, millis: 60, turns: 5, scenes: self.scenes() }.run(ground)?;
        findings.add(self.part, &samples, &self.lines());
        findings.plots.push(self.plot(&samples));
        Ok(())
    }

    fn arms() -> Vec<Arm> {
        // A call without a conflict on an option of the policy. A socket without a peer matches none of the networks.
        let work = Work::Set { call: call(libc::SOL_TCP, libc::TCP_NODELAY, 1), errno: 0 };
        vec![connections::outbound(), connections::accepted(), Arm { name: "set", placement: Placement::Inside, work }]
    }

    fn scenes(&self) -> Vec<Scene> {
        let scene = |name, condition| Scene { name, condition, setup: Vec::new(), arms: Self::arms() };
        let sizes = self.sizes.iter().map(|size| scene(format!("{}-{size}", self.part), (self.condition)(*size)));
        [scene("none".to_owned(), conditions::nothing())].into_iter().chain(sizes).collect()
    }

    fn lines(&self) -> Vec<Line> {
        let Self { part, sizes, .. } = self;
        let mut lines = Vec::new();
        for (arm, label) in [("outbound", "connecting"), ("accepted", "accepting"), ("set", "setsockopt")] {
            for size in &sizes[1..] {
                let (large, small) = (format!("{part}-{size}/{arm}"), format!("{part}-1/{arm}"));
                let line =
                    Line::new(format!("{label}, {size} {part}"), total(large.clone()), "with 1", total(small.clone()));
                // Only the largest size has a budget.
                let has_budget = *part != "prefixes" && Some(size) == sizes.last();
                lines.push(if has_budget { line.budget(Budget::AtMost(1.2)) } else { line });
                if Some(size) == sizes.last() {
                    let none = format!("none/{arm}");
                    let more = added(large, none.clone());
                    lines.push(Line::new(
                        format!("{label}, {size} {part}: added"),
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
