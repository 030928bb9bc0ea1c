//! The build that breaks a rule of durability, or one of groups, on purpose says so
//! and knows its rules; the program itself has no such thing in it.

use std::path::Path;
use std::process::Command;

use nbdsnap_engine::law::Mutant;
use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::process::run;
use nbdsnap_tests::harness::program::{MUTANT_VARIABLE, mutant_program, program};
use nbdsnap_tests::harness::server::Serve;

/// The word that a broken rule is announced with.
const ANNOUNCED: &str = "MUTANT";

fn serve_a_disk(folder: &Path) -> Serve {
    let disk = folder.join("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).expect("a test file can be written");
    let mut serve = Serve::on_socket_in(folder);
    serve.disk("disk", &disk);
    serve.snapshot("disk@s", &folder.join("cow"), "");
    serve
}

fn contains(program: &Path, word: &str) -> bool {
    let bytes = std::fs::read(program).expect("a program can be read");
    bytes.windows(word.len()).any(|at| at == word.as_bytes())
}

#[test]
fn the_program_knows_nothing_of_mutants() {
    let folder = folder();
    for name in ["OneFlush", "Nonsense"] {
        let mut serve = serve_a_disk(folder.path());
        let log = serve.env(MUTANT_VARIABLE, name).start().stop();
        assert!(!log.contains(ANNOUNCED), "{log}");
        assert!(!log.contains(name), "{log}");
    }
    assert!(!contains(program(), MUTANT_VARIABLE));
    // The same look finds it where it is.
    assert!(contains(mutant_program(), MUTANT_VARIABLE));
}

#[test]
fn a_mutant_announces_which_rule_it_breaks() {
    let folder = folder();
    let of_the_engine = Mutant::ALL.iter().map(|mutant| format!("{mutant:?}"));
    for name in of_the_engine.chain(["GroupOneByOne".into()]) {
        let server = serve_a_disk(folder.path()).mutant_named(&name).start();
        let log = server.stop();
        let told = log.contains(&format!("{ANNOUNCED} {name}: "));
        assert_eq!(told, name != "None", "{name}: {log}");
    }
}

#[test]
fn a_mutant_that_nobody_knows_is_refused() {
    for name in ["", "oneflush", "OneFlush2"] {
        let ended = run(Command::new(mutant_program())
            .args(["serve", "/nowhere/disk"])
            .env(MUTANT_VARIABLE, name))
        .failed();
        assert_eq!(ended.code, Some(2), "{ended}");
        let line = format!("nbdsnap: {MUTANT_VARIABLE}={name}: there is none of that name\n");
        assert_eq!(ended.stderr, line);
    }
}
