//! The first bytes of a client are judged the same however they were cut; what a PROXY header says can be said again; and
//! never a panic.
#![no_main]

mod planted;

use libfuzzer_sys::fuzz_target;
use sailover::sniff::{self, HelloReader, ProxyVersion, Verdict};

fuzz_target!(|bytes: &[u8]| {
    if std::env::var_os("SAILOVER_FUZZ_PLANT").is_some() {
        return planted::planted(bytes);
    }
    let Some((step, stream)) = bytes.split_first() else { return };
    let step = usize::from(*step).max(1);

    let whole = HelloReader::default().read(stream);
    let mut reader = HelloReader::default();
    let mut verdict = Verdict::More;
    let mut n = 0;
    while verdict == Verdict::More && n < stream.len() {
        n = (n + step).min(stream.len());
        verdict = reader.read(&stream[..n]);
    }
    // In pieces a mistake may be told earlier, but never another name.
    match (&whole, &verdict) {
        (Verdict::Done(_), _) | (_, Verdict::Done(_)) | (Verdict::More, _) => assert_eq!(whole, verdict),
        (Verdict::Wrong(_), other) => assert!(matches!(other, Verdict::Wrong(_)), "{other:?}"),
    }
    if let Verdict::Done(Some(name)) = whole {
        assert!(sniff::is_host_name(&name), "{name:?}");
    }

    if let Verdict::Done(header) = sniff::proxied(stream) {
        assert!(header.length <= stream.len());
        for n in 0..header.length {
            assert_eq!(sniff::proxied(&stream[..n]), Verdict::More);
        }
        let again = sniff::proxy_header(ProxyVersion::V2, header.addresses, &header.tlvs);
        match sniff::proxied(&again) {
            Verdict::Done(read) => {
                let plain = |address: std::net::SocketAddr| (address.ip().to_canonical(), address.port());
                let plain = |pair: Option<(_, _)>| pair.map(|(a, b)| (plain(a), plain(b)));
                assert_eq!(plain(read.addresses), plain(header.addresses));
                assert!(header.addresses.is_none() || read.tlvs == header.tlvs);
            }
            other => panic!("{other:?} for what was written"),
        }
    }
});
