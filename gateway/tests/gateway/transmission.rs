use crate::support::{NAME, SIZE, STYLES, World, is_closed, pattern};
use std::sync::atomic::Ordering;
use tokio::io::AsyncWriteExt;
use xsan_gateway::client::Request;
use xsan_gateway::nbd::proto::{Style, command, command_flag as flag};
use xsan_gateway::{ExportError, Limits};

const CHUNKED: [Style; 2] = [Style::Structured, Style::Extended];

fn request(command: u16, flags: u16, offset: u64, length: u64) -> Request<'static> {
    Request { command, flags, offset, length, payload: &[] }
}

#[tokio::test]
async fn what_is_written_is_read_back_in_every_style_and_size() {
    for style in STYLES {
        let world = World::new();
        let mut client = world.connect(style).await;
        // Small, at the border to an own buffer, in between, larger than every buffer.
        for length in [512, 4096, 31 << 10, 32 << 10, 33 << 10, 64 << 10, 300 << 10, 5 << 20] {
            let data = pattern(u8::try_from(length >> 9 & 0xff).expect("a byte"), length);
            client.write(4096 + 512, &data, 0).await.expect("written");
            assert!(client.read(4096 + 512, length as u64).await.expect("read") == data, "{style:?} {length}");
        }
        client.disconnect().await.expect("closed in order");
    }
}

#[tokio::test]
async fn payloads_of_32_mib_are_always_accepted() {
    for style in STYLES {
        let world = World::with(true, Limits::default(), |info| info.size = 64 << 20);
        let mut client = world.connect(style).await;
        let data = pattern(3, 32 << 20);
        client.write(512, &data, 0).await.expect("written");
        assert!(client.read(512, 32 << 20).await.expect("read") == data);
        // Even if they are answered with an error.
        let beyond = client.write((64 << 20) - 512, &data, 0).await.expect_err("beyond the end");
        assert_eq!(beyond.errno(), Some(28));
        assert_eq!(client.read(0, 512).await.expect("in step"), [0; 512]);
    }
}

#[tokio::test]
async fn requests_beyond_the_end_get_the_error_of_their_kind() {
    for style in STYLES {
        let mut client = World::new().connect(style).await;
        for offset in [SIZE, SIZE - 512, u64::MAX - 511, 1 << 63] {
            let error = client.write(offset, &[0; 1024], 0).await.expect_err("write beyond");
            assert_eq!(error.errno(), Some(28), "ENOSPC");
            let error = client.command(command::WRITE_ZEROES, offset, 1024, 0).await.expect_err("zero beyond");
            assert_eq!(error.errno(), Some(28), "ENOSPC");
            for command in [command::READ, command::TRIM, command::CACHE] {
                let reply = client.call(request(command, 0, offset, 1024)).await.expect("a reply");
                assert_eq!(reply.error.map(|(errno, _)| errno), Some(22), "EINVAL of {command} at {offset}");
            }
        }
        if style.chunked() {
            let error = client.block_status(SIZE - 512, 1024, 0).await.expect_err("status beyond");
            assert_eq!(error.errno(), Some(22));
        }
        assert!(client.read(SIZE - 512, 512).await.is_ok(), "the last block is fine");
    }
}

#[tokio::test]
async fn unaligned_requests_are_invalid_and_change_nothing() {
    for style in STYLES {
        let mut client = World::new().connect(style).await;
        client.write(0, &[7; 4096], 0).await.expect("written");
        assert_eq!(client.write(1, &[0; 512], 0).await.expect_err("offset").errno(), Some(22));
        assert_eq!(client.write(512, &[0; 100], 0).await.expect_err("length").errno(), Some(22));
        for command in [command::READ, command::TRIM, command::WRITE_ZEROES] {
            let reply = client.call(request(command, 0, 256, 512)).await.expect("a reply");
            assert_eq!(reply.error.map(|(errno, _)| errno), Some(22));
        }
        assert_eq!(client.read(0, 4096).await.expect("read"), [7; 4096]);
    }
}

#[tokio::test]
async fn requests_of_no_bytes_do_not_disconnect() {
    for style in STYLES {
        let world = World::new();
        let mut client = world.connect(style).await;
        for offset in [0, 512, SIZE] {
            assert_eq!(client.read(offset, 0).await.expect("read nothing"), []);
            for command in [command::TRIM, command::CACHE, command::WRITE_ZEROES] {
                client.command(command, offset, 0, 0).await.expect("nothing to do");
            }
            client.write(offset, &[], 0).await.expect("write nothing");
        }
        if style.chunked() {
            assert_eq!(client.block_status(0, 0, 0).await.expect_err("no extent fits").errno(), Some(22));
        }
        assert_eq!(*world.export.started.borrow(), 0, "no export hears of them");
        assert!(client.read(0, 512).await.is_ok());
    }
}

#[tokio::test]
async fn fua_is_accepted_on_every_command_and_reaches_those_that_write() {
    for style in STYLES {
        let world = World::new();
        let mut client = world.connect(style).await;
        client.write(0, &[1; 512], flag::FUA).await.expect("write");
        for (command, length) in [
            (command::READ, 512),
            (command::FLUSH, 0),
            (command::TRIM, 4096),
            (command::CACHE, 512),
            (command::WRITE_ZEROES, 4096),
        ] {
            let reply = client.call(request(command, flag::FUA, 0, length)).await.expect("a reply");
            assert_eq!(reply.error, None, "{style:?} {command}");
        }
        if style.chunked() {
            client.block_status(0, 512, flag::FUA).await.expect("status");
        }
        assert_eq!(world.export.inner.counters.fua.load(Ordering::Relaxed), 3);
        assert_eq!(world.export.inner.counters.flushes.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test]
async fn flags_that_do_not_belong_to_the_command_are_invalid() {
    for style in STYLES {
        let mut client = World::new().connect(style).await;
        let df = if style.chunked() { flag::DF } else { 0 };
        for (command, length, known) in [
            (command::READ, 512, df),
            (command::FLUSH, 0, 0),
            (command::TRIM, 512, 0),
            (command::CACHE, 512, 0),
            (command::WRITE_ZEROES, 4096, flag::NO_HOLE | flag::FAST_ZERO),
        ] {
            for bit in (1..16).map(|shift| 1 << shift) {
                if style == Style::Extended && bit == flag::PAYLOAD_LEN {
                    continue;
                }
                let reply = client.call(request(command, bit, 0, length)).await.expect("a reply");
                let errno = reply.error.map(|(errno, _)| errno);
                assert_eq!(errno, if known & bit != 0 { None } else { Some(22) }, "{style:?} {command} {bit:#x}");
            }
        }
        for bit in [flag::NO_HOLE, flag::DF, flag::REQ_ONE, flag::FAST_ZERO, 1 << 15] {
            let error = client.write(0, &[1; 512], bit).await.expect_err("not a flag of write");
            assert_eq!(error.errno(), Some(22));
        }
        assert!(client.read(0, 512).await.is_ok(), "in step");
    }
}

#[tokio::test]
async fn unknown_commands_are_invalid() {
    for style in STYLES {
        let mut client = World::new().connect(style).await;
        for command in [8, 9, 255, u16::MAX] {
            let reply = client.call(request(command, 0, 0, 512)).await.expect("a reply");
            assert_eq!(reply.error.map(|(errno, _)| errno), Some(22));
        }
        assert!(client.read(0, 512).await.is_ok());
    }
}

#[tokio::test]
async fn a_read_only_export_permits_no_change() {
    for style in STYLES {
        let world = World::with(true, Limits::default(), |info| info.read_only = true);
        let mut client = world.connect(style).await;
        assert_eq!(client.write(0, &[1; 64 << 10], 0).await.expect_err("write").errno(), Some(1));
        for command in [command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(client.command(command, 0, 4096, 0).await.expect_err("change").errno(), Some(1));
        }
        client.flush().await.expect("flush is fine");
        assert_eq!(client.read(0, 512).await.expect("read"), [0; 512]);
    }
}

#[tokio::test]
async fn a_flush_with_a_range_is_invalid() {
    for style in STYLES {
        let mut client = World::new().connect(style).await;
        client.flush().await.expect("flush");
        for (offset, length) in [(512, 0), (0, 512)] {
            assert_eq!(client.command(command::FLUSH, offset, length, 0).await.expect_err("range").errno(), Some(22));
        }
    }
}

#[tokio::test]
async fn zeroed_ranges_read_as_zeroes_exactly_and_trimmed_ones_inside_their_blocks() {
    for style in STYLES {
        let mut client = World::new().connect(style).await;
        let data = pattern(9, 64 << 10);
        client.write(0, &data, 0).await.expect("written");
        for (offset, length) in [(512, 1024), (4096, 4096), (7 << 10, 21 << 10), (40 << 10, 512)] {
            client.command(command::WRITE_ZEROES, offset, length, 0).await.expect("zeroed");
            let mut expected = data.clone();
            let range = usize::try_from(offset).expect("small")..usize::try_from(offset + length).expect("small");
            expected[range].fill(0);
            assert!(client.read(0, 64 << 10).await.expect("read") == expected, "{style:?} {offset}");
            client.write(0, &data, 0).await.expect("written again");
        }
        client.command(command::TRIM, 512, 12 << 10, 0).await.expect("trimmed");
        let read = client.read(0, 64 << 10).await.expect("read");
        assert!(read[..512] == data[..512] && read[(12 << 10) + 512..] == data[(12 << 10) + 512..]);
    }
}

#[tokio::test]
async fn a_fast_zero_is_done_on_whole_blocks_and_refused_untouched_on_cut_ones() {
    for style in STYLES {
        let world = World::with(true, Limits::default(), |info| info.size = SIZE + 512);
        let mut client = world.connect(style).await;
        client.write(0, &[7; 16 << 10], 0).await.expect("written");
        for (offset, length) in [(512, 4096), (0, 512), (4096, 4608)] {
            let error = client.command(command::WRITE_ZEROES, offset, length, flag::FAST_ZERO).await;
            assert_eq!(error.expect_err("slow").errno(), Some(95), "ENOTSUP");
        }
        assert_eq!(client.read(0, 16 << 10).await.expect("read"), [7; 16 << 10], "unchanged");
        client.command(command::WRITE_ZEROES, 4096, 8192, flag::FAST_ZERO | flag::NO_HOLE).await.expect("fast");
        client.command(command::WRITE_ZEROES, SIZE - 4096, 4608, flag::FAST_ZERO).await.expect("up to the end");
        assert_eq!(client.read(4096, 8192).await.expect("read"), [0; 8192]);
        // Without the flag ENOTSUP is never an answer.
        client.command(command::WRITE_ZEROES, 512, 512, 0).await.expect("slow but done");
    }
}

#[tokio::test]
async fn sparse_reads_tell_holes_and_unfragmented_ones_send_their_zeroes() {
    for style in CHUNKED {
        let mut client = World::new().connect(style).await;
        client.write(64 << 10, &[1; 4096], 0).await.expect("written");
        let reply = client.call(request(command::READ, 0, 0, 256 << 10)).await.expect("read");
        assert_eq!(
            reply.parts,
            [(0, 64 << 10, true), (64 << 10, 4096, false), (68 << 10, 188 << 10, true)],
            "{style:?}"
        );
        let whole = client.call(request(command::READ, flag::DF, 0, 256 << 10)).await.expect("read");
        assert_eq!(whole.parts, [(0, 256 << 10, false)]);
        assert!(whole.data == reply.data);
        let hole = client.call(request(command::READ, flag::DF, 1 << 20, 64 << 10)).await.expect("read");
        assert_eq!(hole.parts, [(1 << 20, 64 << 10, true)]);
    }
}

#[tokio::test]
async fn the_allocation_map_follows_writes_trims_and_zeroes() {
    for style in CHUNKED {
        let mut client = World::new().connect(style).await;
        assert_eq!(client.block_status(0, SIZE, 0).await.expect("map"), [(SIZE, 3)]);
        client.write(1 << 20, &[1; 128 << 10], 0).await.expect("written");
        let map = [(1 << 20, 3), (128 << 10, 0), (SIZE - (1 << 20) - (128 << 10), 3)];
        assert_eq!(client.block_status(0, SIZE, 0).await.expect("map"), map);
        assert_eq!(client.block_status(0, SIZE, flag::REQ_ONE).await.expect("one"), map[..1]);
        assert_eq!(client.block_status(1 << 20, 4096, flag::REQ_ONE).await.expect("cut"), [(4096, 0)]);
        client.command(command::TRIM, 1 << 20, 64 << 10, 0).await.expect("trimmed");
        client.command(command::WRITE_ZEROES, (1 << 20) + (64 << 10), 64 << 10, 0).await.expect("zeroed");
        assert_eq!(client.block_status(0, SIZE, 0).await.expect("map"), [(SIZE, 3)]);
    }
    let mut simple = World::new().connect(Style::Simple).await;
    assert_eq!(simple.block_status(0, 512, 0).await.expect_err("not negotiated").errno(), Some(22));
}

#[tokio::test]
async fn extended_requests_cover_more_than_32_bits_at_once() {
    let size = 1 << 44;
    let world = World::with(true, Limits::default(), |info| info.size = size);
    let mut client = world.connect(Style::Extended).await;
    client.write(size / 2, &[1; 4096], 0).await.expect("written");
    let map = client.block_status(0, size, 0).await.expect("16 TiB of map");
    assert_eq!(map, [(size / 2, 3), (4096, 0), (size / 2 - 4096, 3)]);
    client.command(command::TRIM, 0, size, 0).await.expect("16 TiB of trim");
    client.command(command::WRITE_ZEROES, 0, size, 0).await.expect("16 TiB of zeroes");
    client.command(command::CACHE, 0, size, 0).await.expect("16 TiB of cache");
    assert_eq!(client.block_status(0, size, 0).await.expect("map"), [(size, 3)]);
    // Compact requests see it in windows of their own.
    let mut compact = world.connect(Style::Structured).await;
    assert_eq!(compact.block_status(0, 0xffff_fe00, 0).await.expect("map"), [(0xffff_fe00, 3)]);
}

#[tokio::test]
async fn block_status_with_a_payload_answers_for_the_chosen_contexts() {
    let mut client = World::new().connect(Style::Extended).await;
    let payload = |length: u64, ids: &[u32]| {
        let mut bytes = length.to_be_bytes().to_vec();
        ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
        bytes
    };
    let ask = |payload: &'static [u8], offset| Request {
        command: command::BLOCK_STATUS,
        flags: flag::PAYLOAD_LEN,
        offset,
        length: payload.len() as u64,
        payload,
    };
    let good: &'static [u8] = payload(SIZE - 512, &[1]).leak();
    let reply = client.call(ask(good, 512)).await.expect("a reply");
    assert_eq!((reply.error, reply.extents), (None, vec![(SIZE - 512, 3)]));
    let bad = [
        payload(512, &[]),
        payload(512, &[0]),
        payload(512, &[2]),
        payload(512, &[1, 1]),
        payload(512, &[1, 2]),
        payload(0, &[1]),
        payload(100, &[1]),
        payload(SIZE, &[1]),
        vec![0; 13],
        vec![0; 5000],
    ];
    for bytes in bad {
        let reply = client.call(ask(bytes.clone().leak(), 512)).await.expect("a reply");
        assert_eq!(reply.error.map(|(errno, _)| errno), Some(22), "{bytes:?}");
    }
    assert_eq!(client.block_status(0, SIZE, 0).await.expect("in step"), [(SIZE, 3)]);
}

#[tokio::test]
async fn a_payload_nobody_asked_for_is_swallowed_and_refused() {
    let mut client = World::new().connect(Style::Extended).await;
    for (command, bytes) in [(command::READ, 512), (command::TRIM, 4096), (77, 100_000), (command::CACHE, 300_000)] {
        let payload = vec![9; bytes];
        let request = Request { command, flags: flag::PAYLOAD_LEN, offset: 0, length: bytes as u64, payload: &payload };
        let reply = client.call(request).await.expect("a reply");
        assert_eq!(reply.error.map(|(errno, _)| errno), Some(22));
    }
    assert_eq!(client.read(0, 512).await.expect("in step"), [0; 512]);
}

#[tokio::test]
async fn a_write_without_the_payload_flag_is_taken_as_qemu_means_it() {
    let mut client = World::new().connect(Style::Extended).await;
    let request = Request { command: command::WRITE, flags: 0, offset: 0, length: 512, payload: &[6; 512] };
    assert_eq!(client.call(request).await.expect("a reply").error, None);
    assert_eq!(client.read(0, 512).await.expect("read"), [6; 512]);
}

#[tokio::test]
async fn payloads_too_large_are_swallowed_or_end_the_connection() {
    // Compact: swallowed up to twice what is always allowed.
    let world = World::with(true, Limits::default(), |info| info.size = 1 << 30);
    let mut client = world.connect(Style::Simple).await;
    let data = vec![0; (32 << 20) + 512];
    assert_eq!(client.write(0, &data, 0).await.expect_err("too long").errno(), Some(22));
    assert!(client.read(0, 512).await.is_ok(), "in step");
    let header = client.send(request(command::WRITE, 0, 0, 0xffff_fe00)).await;
    assert!(header.is_ok());
    assert!(is_closed(client.stream()).await, "4 GiB are not waited for");
    // Extended: the document wants the end above the advertised maximum.
    let mut client = world.connect(Style::Extended).await;
    client.send(request(command::WRITE, flag::PAYLOAD_LEN, 0, (32 << 20) + 512)).await.expect("sent");
    assert!(is_closed(client.stream()).await);
}

#[tokio::test]
async fn reads_too_long_are_refused_by_the_style_they_come_in() {
    let world = World::with(true, Limits::default(), |info| info.size = 1 << 40);
    for (style, errno) in [(Style::Simple, 22), (Style::Structured, 75), (Style::Extended, 75)] {
        let mut client = world.connect(style).await;
        assert_eq!(client.read(0, (32 << 20) + 512).await.expect_err("too long").errno(), Some(errno));
        assert!(client.read(0, 512).await.is_ok());
    }
}

#[tokio::test]
async fn a_wrong_request_magic_closes_only_its_connection() {
    for style in STYLES {
        let world = World::new();
        let mut good = world.connect(style).await;
        let mut bad = world.connect(style).await;
        AsyncWriteExt::write_all(bad.stream(), &[0x25; 64]).await.expect("sent");
        assert!(is_closed(bad.stream()).await);
        assert!(good.read(0, 512).await.is_ok());
    }
}

#[tokio::test]
async fn errors_of_the_export_reach_the_client_with_their_number() {
    use ExportError as E;
    let cases = [(E::Invalid, 22), (E::NoSpace, 28), (E::ReadOnly, 1), (E::Io, 5), (E::Shutdown, 108)];
    for style in STYLES {
        let world = World::new();
        let mut client = world.connect(style).await;
        for (error, errno) in cases {
            world.export.fail_with(Some(error));
            assert_eq!(client.read(0, 512).await.expect_err("read").errno(), Some(errno));
            assert_eq!(client.write(0, &[0; 512], 0).await.expect_err("write").errno(), Some(errno));
            assert_eq!(client.flush().await.expect_err("flush").errno(), Some(errno));
            assert_eq!(client.command(command::CACHE, 0, 512, 0).await.expect_err("cache").errno(), Some(errno));
            if style.chunked() {
                assert_eq!(client.block_status(0, 512, 0).await.expect_err("status").errno(), Some(errno));
            }
        }
        world.export.fail_with(None);
        assert!(client.read(0, 512).await.is_ok());
    }
}

#[tokio::test]
async fn a_volume_that_has_moved_ends_the_connection_without_an_answer() {
    for style in STYLES {
        let world = World::new();
        let mut client = world.connect(style).await;
        let mut other = world.connect(style).await;
        world.export.fail_with(Some(ExportError::Moved));
        let error = client.write(0, &[7; 512], 0).await.expect_err("no answer");
        assert_eq!(error.errno(), None, "{error}");
        world.export.fail_with(None);
        assert!(other.read(0, 512).await.is_ok(), "a connection that asked nothing goes on");
        assert!(world.connect(style).await.read(0, 512).await.is_ok(), "it may come back");
    }
}

#[tokio::test]
async fn errors_come_with_words_where_the_style_has_room() {
    for style in CHUNKED {
        let mut client = World::new().connect(style).await;
        let reply = client.call(request(command::READ, 0, SIZE, 512)).await.expect("a reply");
        assert_eq!(reply.error, Some((22, "beyond the end of the export".to_owned())));
    }
}

#[tokio::test]
async fn requests_run_side_by_side_and_start_in_the_order_they_came() {
    for style in STYLES {
        let world = World::new();
        let mut client = world.connect(style).await;
        world.export.hold();
        let mut cookies = Vec::new();
        // Two writes to one place: the later one wins although none has completed when both are started.
        for value in 0..100u8 {
            let data = [value; 4096];
            let request = client.write_request(0, &data, 0);
            cookies.push(client.send(request).await.expect("sent"));
        }
        world.export.wait_started(100).await;
        world.export.release();
        for cookie in cookies.into_iter().rev() {
            assert_eq!(client.wait(cookie).await.expect("answered").error, None);
        }
        assert_eq!(client.read(0, 4096).await.expect("read"), [99; 4096], "{style:?}");
    }
}

#[tokio::test]
async fn a_disconnect_waits_for_what_is_under_way() {
    for style in STYLES {
        let world = World::new();
        let mut client = world.connect(style).await;
        world.export.hold();
        let request = client.write_request(0, &[1; 512], 0);
        let cookie = client.send(request).await.expect("sent");
        client.send(self::request(command::DISC, 0, 0, 0)).await.expect("sent");
        world.export.wait_started(1).await;
        world.export.release();
        assert_eq!(client.wait(cookie).await.expect("answered before the end").error, None);
        assert!(is_closed(client.stream()).await);
    }
}

#[tokio::test]
async fn counters_tell_what_a_client_did() {
    let world = World::new();
    let mut client = world.connect(Style::Extended).await;
    client.write(0, &[1; 8192], 0).await.expect("written");
    client.read(0, 4096).await.expect("read");
    client.flush().await.expect("flushed");
    let clients = world.server.clients(NAME);
    assert_eq!(clients.len(), 1);
    let stats = clients[0].stats;
    assert_eq!((stats.requests, stats.read_bytes, stats.written_bytes), (3, 4096, 8192));
}
