//! Structured replies: holes, DF, errors in chunks, and BLOCK_STATUS.

use nbdsnap_tests::harness::wire::{
    Chunk, Negotiation, Session, be16, be32, be64, cmd, errno, flag, meta_request, opt, rep,
};

use super::{FILLED, MIB, Probed, SIZE};

#[test]
fn structured_replies_show_holes_obey_df_and_carry_errors() {
    let probed = Probed::over_unix();
    for export in ["vm", "vm@snap"] {
        let mut session = Session::open_structured(&probed.address, export).expect("a connection");
        let chunks = |session: &mut Session, flags: u16, offset: u64, len: u32| {
            session
                .send(flags, cmd::READ, 77, offset, len, &[])
                .expect("sent");
            let mut chunks: Vec<Chunk> = Vec::new();
            while chunks.last().is_none_or(|chunk| !chunk.done) {
                chunks.push(session.chunk().expect("a chunk"));
                assert_eq!(chunks.last().map(|chunk| chunk.cookie), Some(77));
            }
            chunks
        };
        let straddling = (FILLED - MIB) as u64;
        let found = chunks(&mut session, 0, straddling, 2 << 20);
        let holes: u32 = found
            .iter()
            .filter(|chunk| chunk.kind == 2)
            .map(|chunk| be32(&chunk.payload, 8))
            .sum();
        assert_eq!(holes, 1 << 20, "{export}: half of the range is a hole");
        let read = session
            .read(straddling, 2 << 20)
            .expect("a reply")
            .expect("data");
        assert!(
            read[..MIB] == probed.content[FILLED - MIB..]
                && read[MIB..].iter().all(|byte| *byte == 0)
        );

        let found = chunks(&mut session, flag::DF, straddling, 2 << 20);
        assert_eq!(found.len(), 1, "{export}: DF");
        assert_eq!((found[0].kind, found[0].payload.len()), (1, 8 + 2 * MIB));
        assert_eq!(be64(&found[0].payload, 0), straddling);

        let found = chunks(&mut session, 0, SIZE, 512);
        assert_eq!(found.len(), 1, "{export}: an error");
        assert_eq!(
            (found[0].kind & 0x8000, be32(&found[0].payload, 0)),
            (0x8000, errno::EINVAL)
        );
        let message = usize::from(be16(&found[0].payload, 4));
        assert!(
            found[0].payload.len() >= 6 + message,
            "the error's message is longer than its chunk"
        );
        assert_eq!(
            session.write(SIZE, &[1]).expect("a reply"),
            Err(errno::ENOSPC)
        );
    }
    probed.finish("structured replies");
}

#[test]
fn block_status_answers_in_pieces_that_fit() {
    let probed = Probed::over_unix();
    let mut negotiation = Negotiation::start(&probed.address).expect("a connection");
    negotiation
        .ask(opt::STRUCTURED_REPLY, &[])
        .expect("a reply");
    let replies = negotiation
        .ask(
            opt::SET_META_CONTEXT,
            &meta_request(b"vm@snap", &["base:allocation"]),
        )
        .expect("replies");
    assert_eq!(replies[0].kind, rep::META_CONTEXT);
    let context = be32(&replies[0].data, 0);
    let mut session = negotiation.go("vm@snap").expect("a grant");
    session.structured = true;
    let mut status = |flags: u16, offset: u64, len: u32| -> Result<Vec<(u32, u32)>, u32> {
        session
            .send(flags, cmd::BLOCK_STATUS, 5, offset, len, &[])
            .expect("sent");
        let mut extents = Err(0);
        loop {
            let chunk = session.chunk().expect("a chunk");
            match chunk.kind {
                5 => {
                    assert_eq!(be32(&chunk.payload, 0), context);
                    let pairs = chunk.payload[4..].chunks(8);
                    extents = Ok(pairs.map(|pair| (be32(pair, 0), be32(pair, 4))).collect());
                }
                0 => {}
                _ => extents = Err(be32(&chunk.payload, 0)),
            }
            if chunk.done {
                return extents;
            }
        }
    };
    let hole = 3;
    assert_eq!(
        status(0, 0, SIZE as u32),
        Ok(vec![
            (FILLED as u32, 0),
            ((SIZE - FILLED as u64) as u32, hole)
        ])
    );
    assert_eq!(
        status(flag::REQ_ONE, 0, SIZE as u32),
        Ok(vec![(FILLED as u32, 0)])
    );
    assert_eq!(
        status(flag::REQ_ONE, 0, 1000),
        Ok(vec![(1000, 0)]),
        "one extent no longer than was asked"
    );
    assert_eq!(
        status(flag::REQ_ONE, FILLED as u64 - 1, 1000),
        Ok(vec![(1, 0)])
    );
    assert_eq!(status(0, SIZE - 1, 1), Ok(vec![(1, hole)]));
    assert_eq!(status(0, SIZE - 1, 2), Err(errno::EINVAL));
    assert_eq!(status(0, 0, 0), Err(errno::EINVAL));
    assert_eq!(
        status(0, 0, u32::MAX),
        Err(errno::EINVAL),
        "longer than the export"
    );
    probed.finish("BLOCK_STATUS");
}
