//! Facts about the machine, read when the benchmark starts.

use std::fs;

use serde::Serialize;

use crate::bpf;

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    /// From `uname -r`.
    pub(crate) kernel: String,
    pub(crate) architecture: &'static str,
    pub(crate) processors: usize,
    pub(crate) processor: String,
    pub(crate) memory_gib: f64,
    /// The load average over the last minute, which shows disturbance by other processes.
    pub(crate) load: f64,
    /// The number of BPF programs that others have loaded. Programs on system-call tracepoints slow down every
    /// process.
    pub(crate) programs_of_others: usize,
}

impl Machine {
    pub(crate) fn read() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let value = |path: &str, name: &str| {
            let text = read(path);
            let found = text
                .lines()
                .find_map(|line| Some(line.strip_prefix(name)?.trim_start_matches([' ', '\t', ':']).to_owned()));
            found.unwrap_or_default()
        };
        let first =
            |text: &str| text.split_whitespace().next().and_then(|word| word.parse::<f64>().ok()).unwrap_or_default();
        let processor = value("/proc/cpuinfo", "model name");
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            architecture: std::env::consts::ARCH,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            processor: if processor.is_empty() { "unnamed processor".to_owned() } else { processor },
            memory_gib: first(&value("/proc/meminfo", "MemTotal")) / f64::from(1 << 20),
            load: first(&read("/proc/loadavg")),
            programs_of_others: bpf::programs_after(0),
        }
    }

    /// Returns a one-line description.
    pub(crate) fn text(&self) -> String {
        let Self { kernel, architecture, processors, processor, memory_gib, load, programs_of_others } = self;
        format!(
            "Linux {kernel} {architecture}, {processors} × {processor}, {memory_gib:.0} GiB; \
             at the start: load {load:.2}, {programs_of_others} BPF programs of other owners"
        )
    }
}
