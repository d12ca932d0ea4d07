//! Passes the host's architecture to the programs (`cfg(bpf_target_arch)`): kprobes read registers of that architecture.

fn main() -> aya_build::Result<()> {
    aya_build::emit_bpf_target_arch_cfg()
}
