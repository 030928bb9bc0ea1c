//! The program nbdsnap; see [`nbdsnap::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    nbdsnap::cli::main()
}
