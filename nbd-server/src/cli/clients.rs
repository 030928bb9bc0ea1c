//! `nbdsnap clients` and `nbdsnap disconnect`.

use std::time::{Duration, Instant};

use clap::Args;

use super::Failure;
use super::orders::{ToServer, beside_the_point, print, print_json, rough_size, table};
use crate::control::client::ControlClient;
use crate::control::protocol::{Answer, ClientReport, Disconnect, Order};

/// Say who is attached to what, and how busy each is.
#[derive(Debug, Args)]
pub(super) struct ClientsArgs {
    /// Measure rates over this many seconds; 0: none.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(0..=3600))]
    interval: u64,
    #[command(flatten)]
    server: ToServer,
}

/// Part with a client, by its id in 'nbdsnap clients'.
///
/// What it has sent is answered; then the connection ends. Nothing keeps it from
/// coming back.
#[derive(Debug, Args)]
pub(super) struct DisconnectArgs {
    /// The client.
    #[arg(value_name = "ID")]
    client: u64,
    #[command(flatten)]
    server: ToServer,
}

/// The verb 'clients'.
pub(super) fn list(args: &ClientsArgs) -> Result<(), Failure> {
    let mut server = args.server.connect()?;
    let mut clients = ask(&mut server)?;
    if args.interval > 0 {
        let (before, began) = (clients, Instant::now());
        std::thread::sleep(Duration::from_secs(args.interval));
        clients = ask(&mut server)?;
        let seconds = began.elapsed().as_secs_f64();
        for client in &mut clients {
            if let Some(before) = before.iter().find(|one| one.id == client.id) {
                measure(client, before, seconds);
            }
        }
    }
    if args.server.json {
        return print_json(&clients);
    }
    print(&clients_table(&clients))
}

/// The verb 'disconnect'.
pub(super) fn disconnect(args: &DisconnectArgs) -> Result<(), Failure> {
    let client = args.client;
    let order = Order::Disconnect(Disconnect { client });
    let Answer::Clients(clients) = args.server.order(order)? else {
        return Err(beside_the_point());
    };
    if args.server.json {
        return print_json(&clients);
    }
    let line = |one: &ClientReport| format!("{} ({}): disconnected\n", one.id, one.peer);
    print(&clients.iter().map(line).collect::<String>())
}

fn ask(server: &mut ControlClient) -> Result<Vec<ClientReport>, Failure> {
    match server.order(Order::Clients).map_err(Failure::refused)? {
        Answer::Clients(clients) => Ok(clients),
        _ => Err(beside_the_point()),
    }
}

fn measure(client: &mut ClientReport, before: &ClientReport, seconds: f64) {
    let rate = |now: u64, then: u64| Some((now.saturating_sub(then) as f64 / seconds) as u64);
    client.requests_per_second = rate(client.requests, before.requests);
    client.read_bytes_per_second = rate(client.read_bytes, before.read_bytes);
    client.written_bytes_per_second = rate(client.written_bytes, before.written_bytes);
}

fn clients_table(clients: &[ClientReport]) -> String {
    let rate = |rate: Option<u64>| rate.map_or("-".into(), |rate| rate.to_string());
    let flow =
        |rate: Option<u64>| rate.map_or("-".into(), |rate| format!("{}/s", rough_size(Some(rate))));
    let rows: Vec<Vec<String>> = clients
        .iter()
        .map(|one| {
            vec![
                one.id.to_string(),
                one.peer.clone(),
                one.export.clone(),
                one.in_flight.to_string(),
                rate(one.requests_per_second),
                flow(one.read_bytes_per_second),
                flow(one.written_bytes_per_second),
            ]
        })
        .collect();
    let head = [
        "ID",
        "PEER",
        "EXPORT",
        "IN FLIGHT",
        "REQUESTS/S",
        "READS",
        "WRITES",
    ];
    table(&head, &rows)
}
