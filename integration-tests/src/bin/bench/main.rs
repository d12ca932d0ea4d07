//! `bench`: measures what sockpolicy costs, compared with alternative tools.
//!
//! Every figure is a ratio of interleaved runs. Budgets that are not met are marked in the table, and the exit status
//! is still 0. [`guard`] removes everything that the benchmark creates.

mod arguments;
mod bpf;
mod conditions;
mod error;
mod guard;
mod machine;
mod measure;
mod output;
mod parts;
mod plot;
mod row;
mod scene;
mod table;
mod work;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use arguments::Arguments;
use error::{Attempt, BenchError, Result};
use guard::Workspace;
use machine::Machine;
use row::Findings;

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match words.first().and_then(|word| word.to_str()) {
        Some(work::WORK) => work::serve().map(|()| ExitCode::SUCCESS),
        Some(guard::WITHIN) => within(&words[1..]).map(|()| ExitCode::SUCCESS),
        _ => begin(&words),
    };
    result.unwrap_or_else(|error| {
        let _ = writeln!(io::stderr(), "{error}");
        ExitCode::FAILURE
    })
}

fn begin(words: &[OsString]) -> Result<ExitCode> {
    if Arguments::parse(words)?.wants_help {
        print(&arguments::help())?;
        return Ok(ExitCode::SUCCESS);
    }
    guard::place_in_cgroup(words)
}

fn print(text: &str) -> Result<()> {
    io::stdout().write_all(text.as_bytes()).or_cannot("write to standard output")
}

/// Measures, in a cgroup that the first process removes.
fn within(words: &[OsString]) -> Result<()> {
    let (root, words) =
        words.split_first().ok_or_else(|| BenchError::new("the argument that names the cgroup is missing"))?;
    let arguments = Arguments::parse(words)?;
    let (begin, machine) = (Instant::now(), Machine::read());
    let ground = Workspace::within(PathBuf::from(root))?;
    let mut findings = Findings::default();
    for part in arguments.parts() {
        // Progress messages, since a part takes minutes.
        let _ = writeln!(io::stderr(), "bench: {}: {}", part.name, part.what);
        if let Err(error) = (part.measure)(&ground, &mut findings) {
            findings.leave_out(part.name, &error);
        }
    }
    let took = begin.elapsed();
    print(&table::text(&output::head(&machine, took), &findings.rows))?;
    // The parent of `release`, in target/release/bench.
    let target = ground.bench.ancestors().nth(2).unwrap_or(&ground.scratch);
    output::write(&target.join("bench"), &machine, took, &findings)?;
    match &arguments.docs {
        Some(dir) => output::write_docs(dir, &machine, took, &findings),
        None => Ok(()),
    }
}
