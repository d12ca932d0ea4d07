//! Tells the programs for which machine they are (`cfg(bpf_target_arch)`): kprobes read its registers.

fn main() -> aya_build::Result<()> {
    aya_build::emit_bpf_target_arch_cfg()
}
