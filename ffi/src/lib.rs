//! Run-time loading and raw types of the libraries that thalweg's optional links use.
//!
//! The one place in the workspace that declares foreign functions. It is empty as long as no
//! optional link is there: shared memory and TCP need the C library only.
