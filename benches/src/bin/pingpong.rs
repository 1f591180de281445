//! Latency of messages between two processes, beside what the bare system costs.

use std::process::ExitCode;

fn main() -> ExitCode {
    thalweg_bench::run(thalweg_bench::Program::Pingpong)
}
