//! The rows of the option table that the programs search: one for each level and number whose calls rules govern.
//!
//! A rule names an option once. The kernel may have several names for the value, and may change it as a side effect of
//! another option. Each of these has a row, and all rows of one value share the settings.

use std::collections::BTreeMap;

use abi::setting::{OptionKey, OptionRow, argument, effective, kind, read_back, traits};

use super::table_index;
use crate::{
    options::{GUARDS, Guard, OPTIONS, Relation, SocketOption, by_name},
    policy::model::Named,
};

/// One value of a socket, whatever name the rules use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SocketValue {
    Known(&'static SocketOption),
    Numeric(OptionKey),
}

impl SocketValue {
    pub(super) fn from_named(named: Named) -> Self {
        match named {
            Named::Known(option) => Self::Known(option.canonical()),
            Named::Numeric(key) => Self::Numeric(key),
        }
    }

    /// Returns the [`Named::value_key`] of every option that sets the value.
    pub(super) fn key(self) -> OptionKey {
        match self {
            Self::Known(option) => option.key(),
            Self::Numeric(key) => key,
        }
    }
}

/// A row, without the fields that depend on the scope.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// Index of [`Rows::values`]; `None` if no rule governs the option itself.
    pub(super) value: Option<usize>,
    pub(super) template: OptionRow,
}

/// All rows. Rows of options that rules name come first.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) values: Vec<SocketValue>,
    pub(super) rows: Vec<Row>,
    /// The index of each value.
    by_value: BTreeMap<OptionKey, usize>,
    /// The index of the first row of each option.
    by_key: BTreeMap<OptionKey, usize>,
    /// The index of the first row of each value.
    first: BTreeMap<usize, usize>,
}

impl Rows {
    /// Makes the rows. `named` is every option that a rule names, in the order in which they are applied.
    pub(super) fn new(named: &[Named]) -> Self {
        let mut rows = Self::default();
        for option in named {
            let value = rows.value(SocketValue::from_named(*option));
            let row = named_row(*option);
            let before = rows.first.get(&value).map(|first| rows.rows[*first].template);
            let is_alias = before.is_some_and(|before| before.is_text() == row.is_text());
            rows.push(Some(value), OptionRow { is_alias: is_alias.into(), ..row });
        }
        rows.add_spellings();
        rows.add_guards();
        rows.link_resets();
        rows
    }

    fn value(&mut self, value: SocketValue) -> usize {
        *self.by_value.entry(value.key()).or_insert_with(|| {
            self.values.push(value);
            self.values.len() - 1
        })
    }

    fn push(&mut self, value: Option<usize>, template: OptionRow) -> usize {
        let row = self.rows.len();
        self.by_key.entry(template.key).or_insert(row);
        if let Some(value) = value {
            self.first.entry(value).or_insert(row);
        }
        self.rows.push(Row { value, template });
        row
    }

    fn find(&self, key: OptionKey) -> Option<usize> {
        self.by_key.get(&key).copied()
    }

    /// Returns the value of this option, if a rule names it under any name.
    fn named_value(&self, option: &'static SocketOption) -> Option<usize> {
        self.by_value.get(&option.canonical().key()).copied()
    }

    /// Adds a row for each other name of the values that rules name.
    fn add_spellings(&mut self) {
        for value in 0..self.values.len() {
            let SocketValue::Known(canonical) = self.values[value] else { continue };
            let bit = self.first.get(&value).map_or(0, |row| self.rows[*row].template.bit);
            for (key, option) in canonical.spellings() {
                if self.find(key).is_none() {
                    let row = OptionRow { key, bit, is_alias: 1, read_back: read_back::NONE, ..known_row(option) };
                    self.push(Some(value), row);
                }
            }
        }
    }

    /// Adds a row for each option that undoes a setting of another option, after the option's own row.
    fn add_guards(&mut self) {
        for guard in GUARDS {
            let (Some(option), Some(keeps)) = (by_name(guard.option), by_name(guard.keeps)) else { continue };
            let Some(value) = self.named_value(keeps) else { continue };
            let Guard { kind, lock, .. } = *guard;
            let row = OptionRow { kind, lock, is_alias: 1, read_back: read_back::NONE, ..known_row(option) };
            let last = self.rows.iter().rposition(|row| row.template.key == option.key());
            let added = self.push(Some(value), row);
            if let Some(last) = last {
                self.rows[last].template.next = added as u32 + 1;
            }
        }
    }

    /// Records which options reset an option that a rule names, and adds rows for options that no rule names.
    fn link_resets(&mut self) {
        for option in OPTIONS {
            let Some(Relation::Resets(other)) = option.relation else { continue };
            let Some(reset) =
                by_name(other).and_then(|other| self.named_value(other).and_then(|_| self.find(other.key())))
            else {
                continue;
            };
            // In the last row, since the verdicts of the other rows come first.
            let last = self.rows.iter().rposition(|row| row.template.key == option.key());
            let resetting = last.unwrap_or_else(|| {
                self.push(None, OptionRow { is_alias: 1, read_back: read_back::NONE, ..known_row(option) })
            });
            self.rows[resetting].template.resets = reset as u32 + 1;
        }
    }
}

fn named_row(named: Named) -> OptionRow {
    match named {
        Named::Known(option) => known_row(option),
        Named::Numeric(key) => OptionRow { key, set_as: key, kind: kind::OPAQUE, ..default_row() },
    }
}

/// Returns a row with the defaults for reading a number.
fn default_row() -> OptionRow {
    OptionRow { zero: effective::SAME, negative: effective::SAME, argument: argument::INT, ..OptionRow::default() }
}

/// Returns a row with the option table's facts about an option, as the programs represent them.
fn known_row(option: &'static SocketOption) -> OptionRow {
    let settable = |option: &'static SocketOption| option.settable().is_some().then(|| option.key());
    OptionRow {
        key: option.key(),
        set_as: settable(option).or_else(|| settable(option.canonical())).unwrap_or_else(|| option.key()),
        kind: kind_of(option),
        argument: option.argument,
        traits: option.traits | corrected(option),
        zero: option.zero,
        negative: option.negative,
        read_back: option.settable().map_or(read_back::NONE, |settable| settable.read_back),
        // The bit is the same under all policies, since sockets keep it. Only settable options need one, and there are
        // enough bits.
        bit: table_index(Named::Known(option)).min(abi::SETTABLE_MAX) as u8,
        ..default_row()
    }
}

/// Programs can compare a value with a limit later if they can read it.
fn corrected(option: &SocketOption) -> u8 {
    let is_readable = option.settable().is_some_and(|settable| settable.read_back != read_back::NONE);
    if is_readable { traits::CORRECTED } else { 0 }
}

fn kind_of(option: &SocketOption) -> u8 {
    let kind = option.value.abi_kind();
    let is_unsigned = option.is_unsigned || option.range.1 > i64::from(i32::MAX);
    if kind == kind::INT && is_unsigned { kind::UNSIGNED } else { kind }
}
