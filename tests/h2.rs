//! Clients of HTTP/2: what shares one connection does not stand in its neighbours' way.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::http::{Origin, Version, pool, proxy, runtime};
use crate::support::proxy::{Directory, Proxy};
use crate::tls::Authority;

const PATIENCE: Duration = Duration::from_secs(20);

async fn post(sender: &mut SendRequest<Full<Bytes>>, path: &str, length: usize) -> (u16, String) {
    let request = Request::post(format!("http://a{path}")).body(Full::from(vec![7; length])).unwrap();
    let answer = sender.send_request(request).await.expect("an answer");
    let told = format!("{:?}", answer.headers());
    let status = answer.status().as_u16();
    answer.into_body().collect().await.expect("its end");
    (status, told)
}

#[test]
fn an_upload_that_is_not_taken_ends_in_its_time_and_stops_no_other() {
    // Accepts by its kernel alone.
    let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let origin = Origin::start(Version::One);
    let pools = pool("deaf", &[deaf.local_addr().unwrap()], "probe: off, timeouts: { request: 2s }")
        + &pool("p", &[origin.address], "probe: off");
    let proxy = proxy(&pools, "h2c: true, routes: [ { path: /deaf, pool: deaf }, { pool: p } ]", "");
    let address = proxy.address(0);
    runtime().block_on(async {
        let stream = TcpStream::connect(address).await.unwrap();
        let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut first = sender.clone();
        let deaf = tokio::spawn(async move { post(&mut first, "/deaf", 32 << 20).await });
        let mut others = 0;
        let mut second = sender;
        while !deaf.is_finished() {
            let other = timeout(PATIENCE, post(&mut second, "/", 300_000)).await.expect("the other goes on");
            assert!(other.0 == 200 && other.1.contains("300000"), "{other:?}");
            others += 1;
        }
        assert_eq!(deaf.await.unwrap().0, 504);
        assert!(others > 3, "{others}");
    });
}

#[test]
fn http_2_is_agreed_on_by_tls_and_served() {
    let (authority, directory) = (Authority::new(), Directory::new());
    let pair = authority.write(&directory.0, "site", &["a"], 30);
    let origin = Origin::start(Version::One);
    let proxy = Proxy::start(&format!(
        "pools:\n{}\nlisteners: [ {{ bind: 127.0.0.1:0, tls: {{ certificates: [ {pair} ] }}, http: {{ routes: [ {{ pool: p }} ] }} }} ]",
        pool("p", &[origin.address], "probe: off")
    ));
    let address = proxy.address(0);
    let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
    for (offered, taken) in [
        (&["h2", "http/1.1"][..], Some(&b"h2"[..])),
        (&["http/1.1"], Some(b"http/1.1")),
        (&["h2"], Some(b"h2")),
        (&[], None),
    ] {
        let config = authority.client_of(&versions, None, |config| {
            config.alpn_protocols = offered.iter().map(|name| name.as_bytes().to_vec()).collect();
        });
        runtime().block_on(async {
            let stream = TcpStream::connect(address).await.unwrap();
            let name = ServerName::try_from("a").unwrap();
            let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), taken, "{offered:?}");
            let io = TokioIo::new(stream);
            let request = Request::get("https://a/x").header("host", "a").body(Full::<Bytes>::default()).unwrap();
            let answer = match taken {
                Some(b"h2") => {
                    let (mut sender, connection) = handshake(TokioExecutor::new(), io).await.unwrap();
                    tokio::spawn(connection);
                    sender.send_request(request).await.unwrap()
                }
                _ => {
                    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
                    tokio::spawn(connection);
                    sender.send_request(request).await.unwrap()
                }
            };
            assert_eq!(answer.status(), 200);
            let told = answer.headers()["x-told"].to_str().unwrap().to_owned();
            assert!(told.contains("x-forwarded-proto: https|"), "{told}");
        });
    }
}
