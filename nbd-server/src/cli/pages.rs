//! `nbdsnap completions` and `nbdsnap man`: made from the definition of the
//! command line itself.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, CommandFactory, ValueHint};
use clap_complete::Shell;

use super::{Cli, Failure};

/// Print completions for a shell, to be sourced or put where it looks for them.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Write a man page for every verb into a folder.
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The folder; it has to exist.
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    folder: PathBuf,
}

/// The verb 'completions'.
pub(super) fn completions(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "nbdsnap", &mut text);
    let mut out = std::io::stdout().lock();
    out.write_all(&text)
        .and_then(|()| out.flush())
        .map_err(|error| Failure::Refused(format!("standard output: {error}")))
}

/// The verb 'man'.
pub(super) fn man(args: &ManArgs) -> Result<(), Failure> {
    if !args.folder.is_dir() {
        return Err(Failure::Refused(format!(
            "{}: is not a folder: make it first",
            crate::disks::shown(&args.folder)
        )));
    }
    let command = Cli::command().disable_help_subcommand(true);
    clap_mangen::generate_to(command, &args.folder).map_err(|error| {
        Failure::Refused(format!("{}: {error}", crate::disks::shown(&args.folder)))
    })
}
