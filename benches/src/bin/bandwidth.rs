//! Bandwidth and message rate between two processes, beside what the bare system does.

use std::process::ExitCode;

fn main() -> ExitCode {
    thalweg_bench::run(thalweg_bench::Program::Bandwidth)
}
