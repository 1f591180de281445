//! Run-time loading and raw types of the libraries that thalweg's optional links use.
//!
//! The one place in the workspace that declares foreign functions. Nothing is linked: a library is
//! opened when it is first asked for, and its absence is a value that says what was tried.

mod dl;
mod elf;
mod functions;
pub mod ibverbs;
mod signals;
pub mod ucx;
