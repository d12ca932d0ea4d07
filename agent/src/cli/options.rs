//! `sockpolicy options`: the option table.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use serde_json::json;

use super::{FAILURE, descriptor::stdout, ignore_broken_pipe, output::Format, print_error};
use crate::{
    escape::Escape,
    options::{Class, OPTIONS, SocketOption, ValueKind},
    reference::reference,
    schema,
};

/// List the socket options that policies can name
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sockpolicy options KEEP\n  sockpolicy options --output json")]
pub(super) struct Options {
    /// List only options whose name contains this text
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Output format. markdown ignores NAME
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
}

/// The output format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// Text for people
    #[default]
    Text,
    /// One JSON object per line
    Json,
    /// The reference of the policy language and of all options
    Markdown,
}

impl Options {
    pub(super) fn run(self) -> ExitCode {
        let wanted = self.name.unwrap_or_default().to_uppercase();
        let options: Vec<&SocketOption> = OPTIONS.iter().filter(|option| option.name.contains(&wanted)).collect();
        if options.is_empty() && self.output != Form::Markdown {
            print_error(&NoOption(wanted));
            return FAILURE.into();
        }
        let mut out = stdout(if self.output == Form::Text { Format::Text } else { Format::Json });
        let written = match self.output {
            Form::Text => write_text(&mut out, &options),
            Form::Json => options.iter().try_for_each(|option| writeln!(out, "{}", line(option))),
            Form::Markdown => write!(out, "{}", reference()),
        };
        match ignore_broken_pipe(written.and_then(|()| out.flush())) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print_error(&error);
                FAILURE.into()
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("no option has `{}` in its name", .0.escaped())]
pub(super) struct NoOption(String);

/// Writes two lines for each option: its name, number, what policies can do with it and since which kernel; its values and what it
/// does.
fn write_text(out: &mut impl Write, options: &[&SocketOption]) -> io::Result<()> {
    let name_width = options.iter().map(|option| option.name.len()).max().unwrap_or_default().max("option".len());
    writeln!(out, "{:name_width$}  number  policies can      since", "option")?;
    for option in options {
        let number = format!("{}:{}", option.level.0, option.number);
        let since = option.settable().map_or("", |settable| settable.since);
        let row = format!("{:name_width$}  {number:6}  {:16}  {since}", option.name, verbs(option).join(", "));
        writeln!(out, "{row}\n    {}: {}", value(option), option.about)?;
    }
    Ok(())
}

/// Returns what a policy can do with an option.
fn verbs(option: &SocketOption) -> Vec<&'static str> {
    let mut verbs = Vec::new();
    if matches!(option.class, Class::Settable(_)) {
        verbs.push("set");
    }
    if option.can_be_limited() {
        verbs.push("limit");
    }
    verbs.push("deny");
    verbs
}

fn value(option: &SocketOption) -> String {
    let (min, max) = option.range;
    match option.value {
        ValueKind::Bool => "true, false".to_owned(),
        ValueKind::Opaque(_) => option.value.describe().to_owned(),
        ValueKind::CongestionControl => "name".to_owned(),
        ValueKind::Device => "device name".to_owned(),
        ValueKind::Interface => "device index".to_owned(),
        ValueKind::Dscp => "DSCP".to_owned(),
        ValueKind::Mark => "number, value/mask".to_owned(),
        kind => match (unit(kind), option.class) {
            (unit, Class::ReadOnly) => unit.unwrap_or("number").to_owned(),
            (Some(unit), _) => format!("{unit}, {min} to {max}"),
            (None, _) => format!("{min} to {max}"),
        },
    }
}

fn unit(kind: ValueKind) -> Option<&'static str> {
    match kind {
        ValueKind::Seconds => Some("seconds"),
        ValueKind::Milliseconds => Some("milliseconds"),
        ValueKind::Microseconds => Some("microseconds"),
        ValueKind::Bytes => Some("bytes"),
        ValueKind::Rate => Some("bytes/s"),
        _ => None,
    }
}

fn line(option: &SocketOption) -> serde_json::Value {
    let (min, max) = option.range;
    let is_number = option.can_be_limited();
    let fields = json!({
        "option": option.name,
        "level": option.level.0,
        "level_name": option.level.name(),
        "optname": option.number,
        "can": verbs(option),
        "read_only": option.class == Class::ReadOnly,
        "value": option.value.describe(),
        "min": is_number.then_some(min),
        "max": is_number.then_some(max),
        "set_since": option.settable().map(|settable| settable.since),
        "example": option.settable().map(|_| option.example),
        "about": option.about,
    });
    schema::line("option", fields)
}
