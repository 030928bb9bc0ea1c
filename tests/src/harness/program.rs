//! The program under test: always the plain release build, never one that this
//! package's own features have changed.
//!
//! A build of the whole workspace unifies features: the engine's `mutants`,
//! which the crash suite asks for, would be in the program too, and both builds
//! land in `target/release/nbdsnap`. So the program is built by itself, cargo is
//! asked which features went in, and the file is kept aside as
//! `target/plain/nbdsnap`. `NBDSNAP_BIN` names one that somebody built already.
//!
//! Suites that cut power must notice a broken rule of durability; for them there
//! is [`mutant_program`].

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Names the rule that [`mutant_program`] breaks; means nothing to [`program`].
pub const MUTANT_VARIABLE: &str = "NBDSNAP_MUTANT";

/// The path of the program, built on the first call.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| match std::env::var_os("NBDSNAP_BIN") {
        Some(path) => {
            let path = PathBuf::from(path);
            assert!(path.is_file(), "NBDSNAP_BIN={} is no file", path.display());
            path
        }
        None => build_plain(),
    })
}

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the workspace")
}

/// The program that breaks a rule of durability where `NBDSNAP_MUTANT` names one
/// (of the engine's `Mutant`s), for suites that must notice. Built on the first call,
/// as `target/mutants/nbdsnap`: a profile of its own keeps it apart from the real one.
pub fn mutant_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let options = ["--profile", "mutants", "--features", "nbdsnap/mutants"];
        let executable = build(&options, &["mutants"]);
        assert!(
            executable.ends_with("mutants/nbdsnap"),
            "{}: not in a folder of its own",
            executable.display()
        );
        executable
    })
}

/// The plain program under a name of its own.
fn build_plain() -> PathBuf {
    let executable = build(&["--release"], &[]);
    let plain = executable
        .parent()
        .and_then(Path::parent)
        .expect("the target folder")
        .join("plain");
    std::fs::create_dir_all(&plain).expect("target/plain can be made");
    let aside = plain.join("nbdsnap");
    let fresh = plain.join(format!("nbdsnap.{}", std::process::id()));
    // A second name, not a copy: a file that another thread's child still holds
    // open for writing cannot be run. Cargo replaces files, it does not rewrite them.
    let _ = std::fs::remove_file(&fresh);
    std::fs::hard_link(&executable, &fresh).expect("the program can be given another name");
    std::fs::rename(&fresh, &aside).expect("the name can be given");
    aside
}

/// Have cargo build the program by itself; its path. `features` must have gone
/// into it, and no others.
fn build(options: &[&str], features: &[&str]) -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--package", "nbdsnap", "--message-format", "json"])
        .args(options)
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    assert!(built.status.success(), "cargo build of the program failed");
    let messages = String::from_utf8(built.stdout).expect("cargo prints UTF-8");
    executable(&messages, features)
}

/// The program's path from cargo's messages, after a look at every package of
/// ours that went in: whoever has features must have these.
fn executable(messages: &str, features: &[&str]) -> PathBuf {
    let mut executable = None;
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).expect("cargo prints JSON");
        if message["reason"] != "compiler-artifact" {
            continue;
        }
        let name = message["target"]["name"]
            .as_str()
            .unwrap_or_default()
            .replace('-', "_");
        if !name.starts_with("nbdsnap") {
            continue;
        }
        // The layout of stores has no rules of durability to break.
        let features = if name == "nbdsnap_format" {
            &[]
        } else {
            features
        };
        assert_eq!(
            message["features"],
            serde_json::json!(features),
            "the features that {name} was built with"
        );
        if let Some(path) = message["executable"].as_str() {
            executable = Some(PathBuf::from(path));
        }
    }
    executable.expect("the package nbdsnap has a program")
}
