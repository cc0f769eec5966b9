//! A request that the framer takes ends at the same byte however it was cut, and is a request to another parser too, with
//! the same head and one reading of its length; and never a panic.
#![no_main]

mod planted;

use libfuzzer_sys::fuzz_target;
use sailover::http::framer::{Framer, MAX_FIELDS};

/// Bytes of the first message in `stream`, read in steps; `None` when it is refused, or not whole.
fn first_message(stream: &[u8], step: usize) -> Option<(usize, usize)> {
    let mut framer = Framer::default();
    let (mut seen, mut head) = (0, None);
    while head.is_none() && seen < stream.len() {
        seen = (seen + step).min(stream.len());
        head = framer.head(&stream[..seen]).ok()?;
    }
    let head = head?;
    let mut end = head;
    while !framer.done() && end < stream.len() {
        let part = (end + step).min(stream.len());
        let taken = framer.body(&stream[end..part]).ok()?;
        assert!(taken == part - end || framer.done());
        end += taken;
    }
    framer.done().then_some((head, end))
}

fuzz_target!(|bytes: &[u8]| {
    if std::env::var_os("SAILOVER_FUZZ_PLANT").is_some() {
        return planted::planted(bytes);
    }
    let Some((step, stream)) = bytes.split_first() else { return };
    let whole = first_message(stream, usize::MAX / 2);
    assert_eq!(first_message(stream, usize::from(*step).max(1)), whole);
    let Some((head, end)) = whole else { return };
    assert!(head <= end && end <= stream.len());

    let mut fields = vec![httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let read = request.parse(&stream[..head]).expect("what is taken is a request to others");
    assert_eq!(read, httparse::Status::Complete(head));
    let all = |name: &str| {
        let named = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
        named.map(|field| field.value).collect::<Vec<_>>()
    };
    let (hosts, lengths, codings) = (all("host"), all("content-length"), all("transfer-encoding"));
    assert!(hosts.len() <= 1 && lengths.len() + codings.len() <= 1);
    if let [length] = lengths[..] {
        let length: usize = std::str::from_utf8(length).expect("digits").trim().parse().expect("a number");
        assert_eq!(end - head, length);
    } else if codings.is_empty() {
        assert_eq!(end, head);
    }
});
