//! Offsets and sizes of members of kernel structures, from the kernel's BTF.
//!
//! Rust has no relocations against kernel types (CO-RE). The agent therefore looks up the offsets itself.

use std::{
    fs,
    io::{self, Write},
    os::fd::AsRawFd,
    path::Path,
};

use btf_rs::{Backend, Btf, BtfType, Struct, Type};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::escape::Escape;

/// The file with the kernel's BTF (CONFIG_DEBUG_INFO_BTF).
const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// The types of the kernel.
pub struct Types(Btf);

/// A structure of the kernel.
pub struct Structure<'a> {
    types: &'a Types,
    definition: Struct,
}

/// The position and the size of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The offset from the start of the structure, in bytes.
    pub offset: u32,
    /// The size in bytes; 0 for types without a size of their own in BTF, such as arrays.
    pub size: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("this kernel provides no BTF ({path}: {source})")]
    Missing { path: String, source: io::Error },
    #[error("cannot read {path}: {source}")]
    Unreadable { path: String, source: btf_rs::Error },
}

impl BtfError {
    /// Returns whether the kernel has no BTF. Otherwise it is unknown whether it has any.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Missing { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

impl Types {
    /// Reads the BTF of the running kernel.
    ///
    /// # Errors
    ///
    /// Fails if the kernel provides no BTF, or if the BTF cannot be parsed.
    pub fn of_kernel() -> Result<Self, BtfError> {
        Self::read(Path::new(VMLINUX_BTF))
    }

    fn read(path: &Path) -> Result<Self, BtfError> {
        let missing = |source| BtfError::Missing { path: path.escaped().to_string(), source };
        // To look up a few names in mapped memory takes a tenth of the time that parsing all types takes. The kernel can map
        // the file itself since 6.16; before, a copy in memory is mapped.
        if let Ok(types) = Btf::from_file_with_backend(path, Backend::Mmap) {
            return Ok(Self(types));
        }
        let mut copy =
            fs::File::from(memfd_create("btf", MFdFlags::MFD_CLOEXEC).map_err(|errno| missing(errno.into()))?);
        copy.write_all(&fs::read(path).map_err(missing)?).map_err(missing)?;
        let copy_path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        Btf::from_file_with_backend(copy_path, Backend::Mmap)
            .map(Self)
            .map_err(|source| BtfError::Unreadable { path: path.escaped().to_string(), source })
    }

    /// Returns the structure with this name, or `None` if the kernel has none. Searches all types.
    #[must_use]
    pub fn structure(&self, name: &str) -> Option<Structure<'_>> {
        let definitions = self.0.resolve_types_by_name(name).ok()?;
        definitions.into_iter().find_map(|definition| match definition {
            Type::Struct(definition) => Some(Structure { types: self, definition }),
            _ => None,
        })
    }

    /// Returns the type that `reference` refers to, without typedefs, qualifiers and type tags.
    fn resolve(&self, reference: &dyn BtfType) -> Option<Type> {
        let mut resolved = self.0.resolve_chained_type(reference).ok()?;
        loop {
            resolved = match &resolved {
                Type::Typedef(named) => self.0.resolve_chained_type(named).ok()?,
                Type::Const(qualified) | Type::Volatile(qualified) | Type::Restrict(qualified) => {
                    self.0.resolve_chained_type(qualified).ok()?
                }
                Type::TypeTag(tagged) => self.0.resolve_chained_type(tagged).ok()?,
                _ => return Some(resolved),
            };
        }
    }

    /// Returns the offset in bytes and the type of a member, also of a member of an unnamed structure or union within.
    fn find(&self, definition: &Struct, name: &str) -> Option<(u32, Type)> {
        for member in &definition.members {
            let offset = member.bit_offset() / 8;
            let member_name = self.0.resolve_name(member).unwrap_or_default();
            if member_name == name {
                // A bit field has no address.
                let has_address = member.bitfield_size().is_none_or(|bits| bits == 0);
                return Some((offset, self.resolve(member)?)).filter(|_| has_address);
            }
            if member_name.is_empty()
                && let Some(Type::Struct(inner) | Type::Union(inner)) = self.resolve(member)
                && let Some((inner_offset, member_type)) = self.find(&inner, name)
            {
                return Some((offset + inner_offset, member_type));
            }
        }
        None
    }
}

impl<'a> Structure<'a> {
    /// Returns the position and the size of a member, such as `sk_rcvbuf`. `path` can lead into inner structures, as in
    /// `__sk_common.skc_family`. Members of unnamed structures and unions count as members of the outer structure.
    ///
    /// Returns `None` if there is no such member, or if it is a bit field.
    #[must_use]
    pub fn place(&self, path: &str) -> Option<Member> {
        self.member(path).map(|(offset, member_type)| Member { offset, size: size(&member_type) })
    }

    /// Returns the structure that is the type of a member, or that the member points to. Faster than [`Types::structure`],
    /// which searches all types.
    #[must_use]
    pub fn structure(&self, path: &str) -> Option<Structure<'a>> {
        let (_, mut member_type) = self.member(path)?;
        while let Type::Ptr(pointer) = &member_type {
            member_type = self.types.resolve(pointer)?;
        }
        match member_type {
            Type::Struct(definition) => Some(Structure { types: self.types, definition }),
            // A forward declaration has only the name, for example because several structures have this name.
            Type::Fwd(named) => self.types.structure(&self.types.0.resolve_name(&named).ok()?),
            _ => None,
        }
    }

    fn member(&self, path: &str) -> Option<(u32, Type)> {
        let mut definition = self.definition.clone();
        let mut offset = 0;
        let mut names = path.split('.').peekable();
        while let Some(name) = names.next() {
            let (inner_offset, member_type) = self.types.find(&definition, name)?;
            offset += inner_offset;
            if names.peek().is_none() {
                return Some((offset, member_type));
            }
            let (Type::Struct(inner) | Type::Union(inner)) = member_type else { return None };
            definition = inner;
        }
        None
    }
}

fn size(member_type: &Type) -> u32 {
    match member_type {
        Type::Int(integer) => integer.size() as u32,
        Type::Enum(enumeration) => enumeration.size() as u32,
        Type::Ptr(_) => size_of::<usize>() as u32,
        Type::Struct(structure) | Type::Union(structure) => structure.size() as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_without_btf_is_reported() {
        let error = Types::read(Path::new("/nowhere/vmlinux")).err().map(|error| error.to_string());
        assert_eq!(
            error.as_deref(),
            Some("this kernel provides no BTF (/nowhere/vmlinux: No such file or directory (os error 2))")
        );
    }
}
