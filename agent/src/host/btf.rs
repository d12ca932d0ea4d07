//! The kernel's description of its own types (BTF), for the places of members in its structures.
//!
//! Rust has no relocations against the kernel's types, so what C programs leave to their loader is looked up
//! here.

use std::{
    fs,
    io::{self, Write},
    os::fd::AsRawFd,
    path::Path,
};

use btf_rs::{Backend, Btf, BtfType, Struct, Type};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::escape::Escape;

/// Where a kernel shows its description (CONFIG_DEBUG_INFO_BTF).
pub const PLACE: &str = "/sys/kernel/btf/vmlinux";

/// The description.
pub struct Types(Btf);

/// A structure of the kernel's.
pub struct Structure<'a> {
    types: &'a Types,
    definition: Struct,
}

/// Where a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Bytes from the beginning of the structure.
    pub offset: u32,
    /// Bytes; 0 for what has no plain size, such as an array.
    pub size: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("this kernel shows no BTF ({path}: {source})")]
    Missing { path: String, source: io::Error },
    #[error("cannot read {path}: {source}")]
    Unreadable { path: String, source: btf_rs::Error },
}

impl Types {
    /// Reads the description of the kernel that runs.
    ///
    /// # Errors
    ///
    /// Where it has none, or shows it in a form that is not known here.
    pub fn of_kernel() -> Result<Self, BtfError> {
        Self::read(Path::new(PLACE))
    }

    fn read(path: &Path) -> Result<Self, BtfError> {
        let missing = |source| BtfError::Missing { path: path.escaped().to_string(), source };
        // Looking up a few names in mapped memory takes a tenth of the time that it takes to digest all of them. The
        // file itself can be mapped from 6.16 on only, a copy always.
        if let Ok(types) = Btf::from_file_with_backend(path, Backend::Mmap) {
            return Ok(Self(types));
        }
        let mut copy =
            fs::File::from(memfd_create("btf", MFdFlags::MFD_CLOEXEC).map_err(|errno| missing(errno.into()))?);
        copy.write_all(&fs::read(path).map_err(missing)?).map_err(missing)?;
        let copied = format!("/proc/self/fd/{}", copy.as_raw_fd());
        Btf::from_file_with_backend(copied, Backend::Mmap)
            .map(Self)
            .map_err(|source| BtfError::Unreadable { path: path.escaped().to_string(), source })
    }

    /// The structure of this name, if the kernel has one. All types are gone through for that.
    #[must_use]
    pub fn structure(&self, name: &str) -> Option<Structure<'_>> {
        let definitions = self.0.resolve_types_by_name(name).ok()?;
        definitions.into_iter().find_map(|definition| match definition {
            Type::Struct(definition) => Some(Structure { types: self, definition }),
            _ => None,
        })
    }

    /// What a type is, without the names that were given to it.
    fn resolve(&self, of: &dyn BtfType) -> Option<Type> {
        let mut found = self.0.resolve_chained_type(of).ok()?;
        loop {
            found = match &found {
                Type::Typedef(named) => self.0.resolve_chained_type(named).ok()?,
                Type::Const(qualified) | Type::Volatile(qualified) | Type::Restrict(qualified) => {
                    self.0.resolve_chained_type(qualified).ok()?
                }
                Type::TypeTag(tagged) => self.0.resolve_chained_type(tagged).ok()?,
                _ => return Some(found),
            };
        }
    }

    fn find(&self, definition: &Struct, name: &str) -> Option<(u32, Type)> {
        for member in &definition.members {
            let offset = member.bit_offset() / 8;
            let member_name = self.0.resolve_name(member).unwrap_or_default();
            if member_name == name {
                // Of a bit field no address can be taken.
                let is_whole = member.bitfield_size().is_none_or(|bits| bits == 0);
                return Some((offset, self.resolve(member)?)).filter(|_| is_whole);
            }
            if member_name.is_empty()
                && let Some(Type::Struct(inner) | Type::Union(inner)) = self.resolve(member)
                && let Some((within, found)) = self.find(&inner, name)
            {
                return Some((offset + within, found));
            }
        }
        None
    }
}

impl<'a> Structure<'a> {
    /// Where a member is: `sk_rcvbuf`, or one of a structure within, `__sk_common.skc_family`. Members of unnamed
    /// structures and unions count as the structure's own. `None` also for bit fields.
    #[must_use]
    pub fn place(&self, path: &str) -> Option<Place> {
        self.member(path).map(|(offset, found)| Place { offset, size: size(&found) })
    }

    /// The structure that a member is, or points to. Quicker than by its name, for which all types are gone through.
    #[must_use]
    pub fn structure(&self, path: &str) -> Option<Structure<'a>> {
        let (_, mut found) = self.member(path)?;
        while let Type::Ptr(pointer) = &found {
            found = self.types.resolve(pointer)?;
        }
        match found {
            Type::Struct(definition) => Some(Structure { types: self.types, definition }),
            // Only its name is known there: where there are several of that name.
            Type::Fwd(named) => self.types.structure(&self.types.0.resolve_name(&named).ok()?),
            _ => None,
        }
    }

    fn member(&self, path: &str) -> Option<(u32, Type)> {
        let mut definition = self.definition.clone();
        let mut offset = 0;
        let mut names = path.split('.').peekable();
        while let Some(name) = names.next() {
            let (within, found) = self.types.find(&definition, name)?;
            offset += within;
            if names.peek().is_none() {
                return Some((offset, found));
            }
            let (Type::Struct(inner) | Type::Union(inner)) = found else { return None };
            definition = inner;
        }
        None
    }
}

fn size(of: &Type) -> u32 {
    match of {
        Type::Int(number) => number.size() as u32,
        Type::Enum(number) => number.size() as u32,
        Type::Ptr(_) => size_of::<usize>() as u32,
        Type::Struct(whole) | Type::Union(whole) => whole.size() as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_without_btf_is_named_as_such() {
        let error = Types::read(Path::new("/nowhere/vmlinux")).err().map(|error| error.to_string());
        assert_eq!(
            error.as_deref(),
            Some("this kernel shows no BTF (/nowhere/vmlinux: No such file or directory (os error 2))")
        );
    }
}
