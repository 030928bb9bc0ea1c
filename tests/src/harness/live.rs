//! What the suites of orders to a running server share: clients in the test's own
//! process, and answers as JSON.

use std::path::Path;

use nbdsnap::client::Client;
use nbdsnap::nbd::uri::NbdUri;
use serde_json::Value;

use super::PATIENCE;
use super::process::Finished;
use super::server::Server;

/// A client of an export. What it waits for comes, or the test fails.
pub fn attach(server: &Server, export: &str) -> Client {
    let client = try_attach(server, export);
    client.unwrap_or_else(|error| panic!("{export} cannot be attached: {error}"))
}

/// The same where it may be refused.
pub fn try_attach(server: &Server, export: &str) -> Result<Client, String> {
    let uri: NbdUri = server.uri(export).parse().expect("a URI");
    let client = Client::connect(&uri).map_err(|error| error.to_string())?;
    client
        .set_timeout(Some(PATIENCE))
        .map_err(|error| error.to_string())?;
    Ok(client)
}

/// All bytes of an export.
pub fn contents(server: &Server, export: &str) -> Vec<u8> {
    let mut client = attach(server, export);
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < client.size() {
        let len = (client.size() - bytes.len() as u64).min(1 << 20);
        let piece = client.read(bytes.len() as u64, len as u32);
        bytes.extend_from_slice(&piece.expect("an export can be read"));
    }
    client.disconnect().expect("a farewell");
    bytes
}

/// Give an order that must be done; its answer.
pub fn done(server: &Server, words: &[&str]) -> Value {
    let mut all = words.to_vec();
    all.push("--json");
    server.order(all).ok().json()
}

/// Give an order that must be refused with status 1 and one line; the line.
pub fn refused(server: &Server, words: &[&str]) -> String {
    one_line(&server.order(words), 1)
}

/// Insist on an exit status and on one line of complaint; the line.
pub fn one_line(finished: &Finished, code: i32) -> String {
    assert_eq!(finished.code, Some(code), "{finished}");
    assert!(finished.stdout.is_empty(), "{finished}");
    let line = finished.stderr.trim_end();
    assert!(
        line.starts_with("nbdsnap: ") && !line.contains('\n'),
        "a refusal is one line: {finished}"
    );
    line.to_owned()
}

/// The names in an answer.
pub fn names(answer: &Value) -> Vec<String> {
    let list = answer.as_array().expect("an answer is a list");
    let name = |one: &Value| one["name"].as_str().expect("a name").to_owned();
    list.iter().map(name).collect()
}

/// Exports as clients see them in a list.
pub fn listed(server: &Server, folder: &Path) -> Vec<String> {
    let uri = server.uri("");
    let done = super::process::run_client(folder, "nbdinfo", ["--list", "--json", &uri]).ok();
    let json = done.json();
    let exports = json["exports"].as_array().expect("a list of exports");
    let name = |one: &Value| one["export-name"].as_str().expect("a name").to_owned();
    exports.iter().map(name).collect()
}
