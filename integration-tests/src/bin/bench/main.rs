//! `bench`: what sockpolicy costs, beside what people would use instead.
//!
//! Every figure is a ratio of runs that were made beside each other, in one go. It does not judge: budgets that are not met are
//! said so, and the exit status is 0. See [`guard`] for what it leaves behind, which is nothing.

mod arguments;
mod bpf;
mod guard;
mod machine;
mod measure;
mod output;
mod parts;
mod peers;
mod plot;
mod row;
mod scene;
mod table;
mod trouble;
mod work;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use arguments::Arguments;
use guard::Ground;
use machine::Machine;
use row::Findings;
use trouble::{Attempt, Result, Trouble};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match words.first().and_then(|word| word.to_str()) {
        Some(work::WORK) => work::serve().map(|()| ExitCode::SUCCESS),
        Some(guard::WITHIN) => within(&words[1..]).map(|()| ExitCode::SUCCESS),
        _ => begin(&words),
    };
    result.unwrap_or_else(|trouble| {
        let _ = writeln!(io::stderr(), "{trouble}");
        ExitCode::FAILURE
    })
}

fn begin(words: &[OsString]) -> Result<ExitCode> {
    if Arguments::parse(words)?.wants_help {
        say(&arguments::help())?;
        return Ok(ExitCode::SUCCESS);
    }
    guard::enclose(words)
}

fn say(text: &str) -> Result<()> {
    io::stdout().write_all(text.as_bytes()).or_cannot("write to standard output")
}

/// The measuring itself, in a cgroup that somebody else removes.
fn within(words: &[OsString]) -> Result<()> {
    let (root, words) = words.split_first().ok_or_else(|| Trouble::new("there is no cgroup to work in"))?;
    let arguments = Arguments::parse(words)?;
    let (begin, machine) = (Instant::now(), Machine::look());
    let ground = Ground::within(PathBuf::from(root))?;
    let mut findings = Findings::default();
    for part in arguments.parts() {
        // Somebody waits for minutes.
        let _ = writeln!(io::stderr(), "bench: {}: {}", part.name, part.what);
        if let Err(trouble) = (part.measure)(&ground, &mut findings) {
            findings.leave_out(part.name, &trouble);
        }
    }
    let took = begin.elapsed();
    say(&table::text(&output::head(&machine, took), &findings.rows))?;
    // target/bench, of target/release/bench.
    let target = ground.bench.ancestors().nth(2).unwrap_or(&ground.scratch);
    output::write(&target.join("bench"), &machine, took, &findings)?;
    match &arguments.docs {
        Some(folder) => output::write_docs(folder, &machine, took, &findings),
        None => Ok(()),
    }
}
