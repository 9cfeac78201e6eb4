use crate::support::{MODERN, NAME, SIZE, World, is_closed, refused};
use tokio::io::AsyncReadExt;
use xsan_gateway::Limits;
use xsan_gateway::client::{Negotiation, info_data, meta_data};
use xsan_gateway::nbd::proto::{Style, export_flag as flag, option, option_reply as rep};

#[tokio::test]
async fn the_greeting_is_fixed_newstyle_never_oldstyle() {
    let mut stream = World::new().dial();
    let mut greeting = [0; 18];
    AsyncReadExt::read_exact(&mut stream, &mut greeting).await.expect("a greeting");
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    assert_eq!(greeting[16..], [0, 3], "fixed newstyle and no zeroes, nothing else");
}

#[tokio::test]
async fn unknown_client_flags_close_the_connection() {
    let world = World::new();
    for flags in [4, 1 << 31, u32::MAX] {
        let negotiation = Negotiation::start(world.dial(), flags).await.expect("a greeting");
        assert!(is_closed(&negotiation.into_inner()).await, "{flags:#x}");
    }
}

#[tokio::test]
async fn a_plain_newstyle_client_gets_its_export_and_nothing_else() {
    let world = World::new();
    let negotiation = Negotiation::start(world.dial(), 0).await.expect("a greeting");
    let mut client = negotiation.export_name(NAME, true).await.expect("size, flags, zeroes");
    assert_eq!(client.size(), SIZE);
    client.write(0, &[5; 512], 0).await.expect("written");
    assert_eq!(client.read(0, 512).await.expect("read"), [5; 512]);
    let mut negotiation = Negotiation::start(world.dial(), 0).await.expect("a greeting");
    negotiation.send_option(option::LIST, &[]).await.expect("sent");
    assert!(is_closed(&negotiation.into_inner()).await, "no reply exists in plain newstyle");
}

#[tokio::test]
async fn export_name_pads_with_zeroes_only_if_the_client_wants_them() {
    let world = World::new();
    for (flags, zeroes) in [(MODERN, false), (1, true), (2, false)] {
        let negotiation = Negotiation::start(world.dial(), flags).await.expect("a greeting");
        let mut client = negotiation.export_name(NAME, zeroes).await.expect("export");
        assert_eq!(client.read(0, 512).await.expect("the stream is in step"), [0; 512]);
    }
}

#[tokio::test]
async fn export_name_of_an_unknown_export_closes_the_connection() {
    let world = World::new();
    for name in [&b"nope"[..], b"\xff", b"v\0m1"] {
        let mut negotiation = world.haggle().await;
        negotiation.send_option(option::EXPORT_NAME, name).await.expect("sent");
        assert!(is_closed(&negotiation.into_inner()).await);
    }
}

#[tokio::test]
async fn unknown_options_are_answered_unsup_and_parsing_goes_on() {
    let mut negotiation = World::new().haggle().await;
    for (code, length) in [(4, 0), (12, 77), (0, 1000), (u32::MAX, 65_536), (99, 100_000)] {
        let replies = negotiation.option(code, &vec![1; length]).await.expect("a reply");
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].kind, rep::ERR_UNSUP, "option {code}");
    }
    assert_eq!(negotiation.list().await.expect("still in step").len(), 1);
}

#[tokio::test]
async fn abort_is_acknowledged_and_ends_the_session() {
    let world = World::new();
    for data in [&b""[..], b"ignored"] {
        let mut negotiation = world.haggle().await;
        let replies = negotiation.option(option::ABORT, data).await.expect("a reply");
        assert_eq!(replies[0].kind, rep::ACK);
        assert!(is_closed(&negotiation.into_inner()).await);
    }
}

#[tokio::test]
async fn list_tells_names_and_descriptions_and_takes_no_data() {
    let mut negotiation = World::new().haggle().await;
    assert_eq!(negotiation.list().await.expect("a list"), [(NAME.to_owned(), "a test volume".to_owned())]);
    for code in [option::LIST, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        let error = negotiation.must(code, b"x").await.expect_err("no data allowed");
        assert_eq!(refused(&error), Some(rep::ERR_INVALID));
    }
    let error = negotiation.must(option::STARTTLS, b"").await.expect_err("no TLS here");
    assert_eq!(refused(&error), Some(rep::ERR_POLICY));
}

#[tokio::test]
async fn info_and_go_tell_the_same_and_all_that_was_asked() {
    let mut negotiation = World::new().haggle().await;
    let info = negotiation.info(option::INFO, NAME).await.expect("info");
    assert_eq!(info.size, SIZE);
    assert_eq!(info.block_sizes, Some((512, 4096, 32 << 20)));
    assert_eq!(info.name.as_deref(), Some(NAME));
    assert_eq!(info.description.as_deref(), Some("a test volume"));
    let client = negotiation.go(NAME).await.expect("go");
    assert_eq!(*client.description(), info);
}

#[tokio::test]
async fn info_sends_only_what_is_asked_and_the_sizes() {
    let mut negotiation = World::new().haggle().await;
    let replies = negotiation.must(option::INFO, &info_data(NAME, &[77])).await.expect("unknown items are ignored");
    let kinds: Vec<u8> = replies.iter().map(|reply| reply.data[1]).collect();
    assert_eq!(kinds, [0, 3]);
    assert_eq!((replies[0].data.len(), replies[1].data.len()), (12, 14));
}

#[tokio::test]
async fn the_empty_name_is_the_only_export() {
    let world = World::new();
    let mut client = world.haggle().await.go("").await.expect("the default export");
    assert_eq!(client.description().name.as_deref(), Some(NAME));
    assert_eq!(client.read(0, 512).await.expect("read").len(), 512);
    assert_eq!(world.server.clients(NAME).len(), 1);
}

#[tokio::test]
async fn an_unknown_export_is_refused_and_haggling_goes_on() {
    let mut negotiation = World::new().haggle().await;
    for code in [option::INFO, option::GO] {
        let error = negotiation.info(code, "nope").await.expect_err("unknown");
        assert_eq!(refused(&error), Some(rep::ERR_UNKNOWN));
    }
    for code in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        negotiation.set_style(Style::Structured).await.expect("structured");
        let error = negotiation.meta(code, "nope", &["base:allocation"]).await.expect_err("unknown");
        assert_eq!(refused(&error), Some(rep::ERR_UNKNOWN));
    }
    assert!(negotiation.go(NAME).await.is_ok());
}

#[tokio::test]
async fn malformed_info_is_invalid() {
    let mut negotiation = World::new().haggle().await;
    let whole = info_data(NAME, &[1, 2]);
    let mut long_name = whole.clone();
    long_name[3] = 200;
    let mut wrong_count = whole.clone();
    wrong_count[8] = 9;
    let too_long = info_data(&"x".repeat(4097), &[]);
    for data in [&[][..], &whole[..5], &whole[..whole.len() - 1], &long_name, &wrong_count, &too_long] {
        let error = negotiation.must(option::INFO, data).await.expect_err("malformed");
        assert_eq!(refused(&error), Some(rep::ERR_INVALID));
    }
    assert!(negotiation.info(option::INFO, NAME).await.is_ok());
}

#[tokio::test]
async fn transmission_flags_follow_what_was_negotiated() {
    let world = World::new();
    let base = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::SEND_TRIM
        | flag::SEND_WRITE_ZEROES
        | flag::CAN_MULTI_CONN
        | flag::SEND_CACHE
        | flag::SEND_FAST_ZERO;
    let mut negotiation = world.haggle().await;
    assert_eq!(negotiation.info(option::INFO, NAME).await.expect("info").flags, base, "DF only with chunks");
    negotiation.set_style(Style::Structured).await.expect("structured");
    assert_eq!(negotiation.info(option::INFO, NAME).await.expect("info").flags, base | flag::SEND_DF);
    negotiation.set_style(Style::Extended).await.expect("extended");
    assert_eq!(negotiation.info(option::INFO, NAME).await.expect("info").flags, base | flag::SEND_DF);
    negotiation.meta(option::SET_META_CONTEXT, NAME, &["base:allocation"]).await.expect("contexts");
    let flags = negotiation.info(option::INFO, NAME).await.expect("info").flags;
    assert_eq!(flags, base | flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD);
    let single = World::with(false, Limits::default(), |info| info.read_only = true);
    let flags = single.haggle().await.info(option::INFO, NAME).await.expect("info").flags;
    assert_eq!(flags & (flag::READ_ONLY | flag::CAN_MULTI_CONN), flag::READ_ONLY);
    assert_eq!(flags & (flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO), 0);
}

#[tokio::test]
async fn extended_headers_take_precedence_and_exclude_export_name() {
    let world = World::new();
    let mut negotiation = world.haggle().await;
    negotiation.set_style(Style::Extended).await.expect("extended");
    let error = negotiation.must(option::STRUCTURED_REPLY, &[]).await.expect_err("no way back");
    assert_eq!(refused(&error), Some(rep::ERR_EXT_HEADER_REQD));
    negotiation.send_option(option::EXPORT_NAME, NAME.as_bytes()).await.expect("sent");
    assert!(is_closed(&negotiation.into_inner()).await);
    let mut negotiation = world.haggle().await;
    negotiation.set_style(Style::Structured).await.expect("structured first is fine");
    negotiation.set_style(Style::Extended).await.expect("then extended");
    assert!(negotiation.go(NAME).await.expect("go").read(0, 512).await.is_ok());
}

#[tokio::test]
async fn metadata_contexts_need_structured_replies() {
    let mut negotiation = World::new().haggle().await;
    for code in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let error = negotiation.meta(code, NAME, &["base:allocation"]).await.expect_err("too early");
        assert_eq!(refused(&error), Some(rep::ERR_INVALID));
    }
}

#[tokio::test]
async fn metadata_queries_match_wildcards_only_in_lists() {
    let mut negotiation = World::new().haggle().await;
    negotiation.set_style(Style::Structured).await.expect("structured");
    let all: &[&[&str]] = &[&[], &["base:"], &["base:allocation"], &["x-other:a", "base:allocation", "base:"]];
    for queries in all {
        let found = negotiation.meta(option::LIST_META_CONTEXT, NAME, queries).await.expect("a list");
        assert_eq!(found, [(0, "base:allocation".to_owned())], "{queries:?}");
    }
    for queries in [&["base:other"][..], &["qemu:dirty-bitmap:b"], &["x-a:"]] {
        for code in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            assert_eq!(negotiation.meta(code, NAME, queries).await.expect("nothing found is no error"), []);
        }
    }
    for queries in [&[][..], &["base:"]] {
        assert_eq!(negotiation.meta(option::SET_META_CONTEXT, NAME, queries).await.expect("chooses nothing"), []);
    }
    let twice = ["base:allocation", "base:allocation"];
    let chosen = negotiation.meta(option::SET_META_CONTEXT, NAME, &twice).await.expect("chosen");
    assert_eq!(chosen, [(1, "base:allocation".to_owned())], "once");
}

#[tokio::test]
async fn malformed_metadata_queries_are_invalid() {
    let mut negotiation = World::new().haggle().await;
    negotiation.set_style(Style::Extended).await.expect("extended");
    let whole = meta_data(NAME, &["base:allocation"]);
    let mut beyond = whole.clone();
    beyond[14] = 200;
    let mut count = whole.clone();
    count[10] = 2;
    let mut trailing = whole.clone();
    trailing.push(0);
    let long = meta_data(NAME, &[&format!("base:{}", "x".repeat(4096))]);
    let no_colon = meta_data(NAME, &["allocation"]);
    for data in [&[][..], &whole[..9], &beyond, &count, &trailing, &long, &no_colon] {
        for code in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            let error = negotiation.must(code, data).await.expect_err("malformed");
            assert_eq!(refused(&error), Some(rep::ERR_INVALID));
        }
    }
}

#[tokio::test]
async fn contexts_hold_for_the_export_they_were_chosen_for_and_until_the_next_choice() {
    let world = World::new();
    for (name, last, works) in [(NAME, NAME, true), ("", NAME, false), (NAME, "nope", false), (NAME, "", false)] {
        let mut negotiation = world.haggle().await;
        negotiation.set_style(Style::Extended).await.expect("extended");
        negotiation.meta(option::SET_META_CONTEXT, NAME, &["base:allocation"]).await.expect("chosen");
        // A choice that fails takes the one before with it.
        let _: Result<_, _> = negotiation.meta(option::SET_META_CONTEXT, last, &["base:allocation"]).await;
        let mut client = negotiation.go(name).await.expect("go");
        let map = client.block_status(0, SIZE, 0).await;
        assert_eq!(map.is_ok(), works, "go {name:?} after {last:?}");
        if let Err(error) = map {
            assert_eq!(error.errno(), Some(22));
        }
    }
}

#[tokio::test]
async fn options_too_long_to_look_at_are_skipped_and_monsters_close() {
    let world = World::new();
    let mut negotiation = world.haggle().await;
    let error = negotiation.must(option::INFO, &vec![0; 70_000]).await.expect_err("too long");
    assert_eq!(refused(&error), Some(rep::ERR_TOO_BIG));
    assert!(negotiation.list().await.is_ok(), "still in step");
    let mut negotiation = world.haggle().await;
    let mut header = Vec::new();
    header.extend(b"IHAVEOPT");
    header.extend(option::INFO.to_be_bytes());
    header.extend(u32::MAX.to_be_bytes());
    negotiation.stream().write_all(&header).await.expect("sent");
    assert!(is_closed(&negotiation.into_inner()).await);
}

#[tokio::test]
async fn a_wrong_option_magic_closes_the_connection() {
    let mut negotiation = World::new().haggle().await;
    negotiation.stream().write_all(b"IHAVEOPS\0\0\0\x03\0\0\0\0").await.expect("sent");
    assert!(is_closed(&negotiation.into_inner()).await);
}
