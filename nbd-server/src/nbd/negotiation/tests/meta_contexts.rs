//! LIST_META_CONTEXT and SET_META_CONTEXT.

use super::*;

fn context(id: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], b"base:allocation"].concat()
}

/// The contexts that an option was answered, followed by an ACK.
fn contexts(peer: &mut Peer, option: u32, data: &[u8]) -> Vec<Vec<u8>> {
    let mut replies = peer.ask(option, data);
    assert_eq!(replies.pop().unwrap().kind, NBD_REP_ACK);
    assert!(replies.iter().all(|r| r.kind == NBD_REP_META_CONTEXT));
    replies.into_iter().map(|reply| reply.data).collect()
}

#[test]
fn meta_contexts_are_listed_once_by_name_wildcard_or_no_query() {
    let mut peer = structured_peer();
    let mut list = |queries: &[&str]| {
        let data = meta("disk", queries);
        contexts(&mut peer, NBD_OPT_LIST_META_CONTEXT, &data)
    };
    let matching: [&[&str]; 4] = [
        &[],
        &["base:"],
        &["base:allocation"],
        &["x:y", "base:allocation", "base:", "base:allocation"],
    ];
    for queries in matching {
        assert_eq!(list(queries), [context(0)], "{queries:?}");
    }
    for query in [
        "qemu:",
        "base:alloc",
        "base:allocation2",
        "base",
        "",
        "BASE:",
    ] {
        assert!(list(&[query]).is_empty(), "{query}");
    }
    // Listing selects nothing.
    assert_eq!(peer.go("disk").base_allocation, None);
}

#[test]
fn meta_contexts_are_set_by_name_and_for_the_export_of_go_only() {
    let set = |export: &str, queries: &[&str]| {
        let mut peer = structured_peer();
        let data = meta(export, queries);
        let answered = contexts(&mut peer, NBD_OPT_SET_META_CONTEXT, &data);
        (peer, answered)
    };
    let (mut peer, answered) = set("disk", &["base:allocation", "base:allocation", "qemu:x"]);
    assert_eq!(answered, [context(1)]);
    assert_eq!(peer.go("disk").base_allocation, Some(1));
    let (mut peer, _) = set("disk", &["base:allocation"]);
    assert_eq!(peer.go("disk@mon").base_allocation, None);
    let (mut peer, _) = set("", &["base:allocation"]);
    assert_eq!(peer.go("disk").base_allocation, Some(1));
    for queries in [&[][..], &["base:"], &["qemu:allocation-depth"]] {
        let (mut peer, answered) = set("disk", queries);
        assert!(answered.is_empty());
        assert_eq!(peer.go("disk").base_allocation, None);
    }
    // EXPORT_NAME keeps the choice as well.
    let (mut peer, _) = set("disk", &["base:allocation"]);
    let Ok(Step::Done(agreed)) = peer.send(NBD_OPT_EXPORT_NAME, b"disk") else {
        panic!("EXPORT_NAME was refused");
    };
    assert_eq!(agreed.base_allocation, Some(1));
}

#[test]
fn a_later_set_replaces_the_choice_even_if_it_fails() {
    let mut cut = meta("disk", &["base:allocation"]);
    cut.pop();
    let too_long = vec![0; MAX_OPTION_BYTES + 1];
    let (nothing, unknown) = (meta("disk", &[]), meta("nope", &["base:allocation"]));
    for (data, kind) in [
        (&nothing, NBD_REP_ACK),
        (&unknown, NBD_REP_ERR_UNKNOWN),
        (&cut, NBD_REP_ERR_INVALID),
        (&too_long, NBD_REP_ERR_TOO_BIG),
    ] {
        let mut peer = structured_peer();
        let good = meta("disk", &["base:allocation"]);
        contexts(&mut peer, NBD_OPT_SET_META_CONTEXT, &good);
        assert_eq!(peer.ask_kind(NBD_OPT_SET_META_CONTEXT, data), kind);
        assert_eq!(peer.go("disk").base_allocation, None);
    }
}

#[test]
fn meta_contexts_with_wrong_lengths_or_too_early_are_invalid() {
    let good = meta("disk", &["base:allocation"]);
    let mut trailing = good.clone();
    trailing.push(0);
    let mut more_queries = good.clone();
    more_queries[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut long_query = good.clone();
    long_query[12..16].copy_from_slice(&16u32.to_be_bytes());
    for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
        let early = Peer::new(BOTH_FLAGS).ask_kind(option, &good);
        assert_eq!(early, NBD_REP_ERR_INVALID);
        let mut peer = structured_peer();
        for data in [&trailing, &more_queries, &long_query] {
            assert_eq!(peer.ask_kind(option, data), NBD_REP_ERR_INVALID);
        }
        for cut in 0..good.len() {
            let mut peer = structured_peer();
            assert_eq!(peer.ask_kind(option, &good[..cut]), NBD_REP_ERR_INVALID);
        }
        let long = "x".repeat(4097);
        for data in [meta(&long, &[]), meta("disk", &[&long])] {
            assert_eq!(peer.ask_kind(option, &data), NBD_REP_ERR_TOO_BIG);
        }
        let just_fits = meta("disk", &[&long[..4096]]);
        assert_eq!(peer.ask_kind(option, &just_fits), NBD_REP_ACK);
        let unknown = meta("nope", &["base:allocation"]);
        assert_eq!(peer.ask_kind(option, &unknown), NBD_REP_ERR_UNKNOWN);
    }
}
