//! What `ls` and `verify` have in common.

use std::io;

use crate::{
    compile::CompileError,
    host::{cgroup::CgroupError, socket_table::SurveyError},
    targets::TargetError,
};

#[derive(Debug, thiserror::Error)]
pub(super) enum LiveSocketsError {
    #[error("{0}")]
    Target(#[from] TargetError),
    #[error("{0}")]
    Compile(#[from] CompileError),
    #[error("{0}")]
    Sockets(#[from] SurveyError),
    #[error("cannot write the answer: {0}")]
    Write(#[from] io::Error),
}

impl From<CgroupError> for LiveSocketsError {
    fn from(error: CgroupError) -> Self {
        Self::Target(error.into())
    }
}
