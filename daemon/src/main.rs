//! The `outpost` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    outpost::cli::main()
}
