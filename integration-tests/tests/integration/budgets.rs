//! The cost of sockpolicy's programs for the verifier, compared with their budgets. The cost is a count, which does
//! not depend on the machine's speed.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use sockpolicy_integration_tests::{agent, kernels::Kernel, require};

const BUDGETS: &str = include_str!("../../budgets.toml");

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Budgets {
    kernel: Vec<Row>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    /// The prefix of `uname -r`.
    release: String,
    /// Instructions, by program.
    programs: BTreeMap<String, u64>,
}

#[test]
fn no_program_exceeds_its_budget_by_more_than_a_tenth() {
    require!("verified");
    let release = &Kernel::current().release;
    let Budgets { kernel } = toml::from_str(BUDGETS).unwrap();
    let row = kernel.into_iter().find(|row| release.starts_with(&row.release));
    let budget = row.unwrap_or_else(|| panic!("kernel {release} is not in integration-tests/budgets.toml")).programs;
    let doctor: Value = serde_json::from_slice(&agent::output(&["doctor", "-o", "json"]).stdout).unwrap();
    let taken: BTreeMap<String, u64> = doctor["programs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| (line["name"].as_str().unwrap().to_owned(), line["verified_instructions"].as_u64().unwrap()))
        .collect();
    let lines: Vec<String> = taken.iter().map(|(program, count)| format!("{program} = {count}")).collect();
    let now = lines.join("\n");
    assert!(
        taken.keys().eq(budget.keys()),
        "budgets.toml lists other programs for {release}; the current counts are\n{now}"
    );
    for (program, count) in &taken {
        let most = budget[program] + budget[program] / 10;
        assert!(
            *count <= most,
            "{program} takes {count} instructions, at most {most} are permitted on {release}; the current counts are\n{now}"
        );
    }
}

#[test]
fn kernel_reports_verified_instructions_if_kernels_toml_says_so() {
    let doctor: Value = serde_json::from_slice(&agent::output(&["doctor", "-o", "json"]).stdout).unwrap();
    let programs = doctor["programs"].as_array().unwrap();
    assert!(!programs.is_empty());
    let reported = programs.iter().all(|line| line["verified_instructions"].is_u64());
    assert_eq!(reported, Kernel::current().has("verified"), "{programs:?}");
}
