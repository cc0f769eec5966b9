//! TLS: what listeners serve with, what pools and probes ask backends with, and a stream that is either TLS or plain.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ProducesTickets, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, HandshakeKind, NamedGroup, RootCertStore, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;
use x509_parser::asn1_rs::ToDer;
use x509_parser::x509::{AttributeTypeAndValue, RelativeDistinguishedName};

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A client that trusts the authorities of a PEM file, or, without one, takes any certificate whose key the server
/// proves to have. Reading many authorities takes milliseconds.
///
/// # Errors
/// A sentence, when the library refuses its own defaults.
pub fn client(authorities: Option<&[u8]>) -> Result<Arc<ClientConfig>, String> {
    let provider = provider();
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS: {error}"))?;
    let mut config = match authorities {
        Some(pem) => {
            let mut roots = RootCertStore::empty();
            // One odd certificate among a hundred must not cost the others; that there is one at all was checked.
            let (added, _) = roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten());
            if added == 0 {
                return Err("a list of authorities holds no certificate that can be used".into());
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        }
        None => {
            let any = Arc::new(AnyCertificate(provider));
            builder.dangerous().with_custom_certificate_verifier(any).with_no_client_auth()
        }
    };
    // Each probe is to be a whole handshake.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The end of the year 9999, in seconds since 1970.
pub const LAST_SECOND: i64 = 253_402_300_800;

/// When a certificate ends, in seconds since 1970; `None` when it cannot be read.
pub fn expiry(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    // Whoever shows it may write any time; those that no calendar has are no times.
    Some(certificate.validity().not_after.timestamp()).filter(|at| (1..LAST_SECOND).contains(at))
}

/// Accepts any certificate, but not one whose key the server has not.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

// ---- towards backends ----

/// PEM of a chain of certificates, and of its key.
pub type PemPair = (Arc<[u8]>, Arc<[u8]>);

/// TLS towards the backends of a pool.
pub struct Upstream {
    /// The name that is asked for, and that the certificate must have.
    pub name: String,
    /// The same, for a handshake.
    pub server_name: ServerName<'static>,
    /// Whether the certificate is judged.
    pub verify: bool,
    /// PEM of the authorities, and of what we show.
    pub authorities: Arc<[u8]>,
    /// See `authorities`.
    pub identity: Option<PemPair>,
    /// When the certificate that we show ends, in seconds since 1970.
    pub ends: Option<i64>,
    /// What its handshakes are made by, for plain bytes.
    pub client: Arc<ClientConfig>,
    /// The same for probes, each a whole handshake in which the certificate is judged: of plain bytes, and of HTTP with what it
    /// offers by ALPN.
    pub probe: Arc<ClientConfig>,
    /// See `probe`.
    pub http: [Arc<ClientConfig>; 2],
    /// Stands for all of it.
    pub digest: u64,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream").field("name", &self.name).finish_non_exhaustive()
    }
}

impl PartialEq for Upstream {
    fn eq(&self, other: &Upstream) -> bool {
        self.digest == other.digest
    }
}

impl Upstream {
    /// Puts it together; `digest` stands for all that it is made of.
    ///
    /// # Errors
    /// A sentence.
    pub fn new(
        name: &str,
        verify: bool,
        authorities: Arc<[u8]>,
        identity: Option<PemPair>,
        digest: u64,
    ) -> Result<Upstream, String> {
        let server_name = ServerName::try_from(name.to_owned()).map_err(|_| format!("{name} is no server name"))?;
        let mut config = ClientConfig::clone(&*client(verify.then_some(&*authorities))?);
        let mut ends = None;
        if let Some((chain, key)) = &identity {
            let shown = self::identity(chain, key).map_err(|(_, error)| format!("TLS to backends: {error}"))?;
            ends = Some(shown.valid.1);
            config.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(shown.key.clone()));
        }
        let offering = |protocols: &[&[u8]]| {
            let mut config = config.clone();
            config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
            Arc::new(config)
        };
        let http = [offering(&[b"http/1.1"]), offering(&[b"h2", b"http/1.1"])];
        let probe = Arc::new(config.clone());
        // Unlike a probe's, these handshakes may be short.
        config.resumption = Resumption::store(Arc::new(Tickets::default()));
        Ok(Upstream {
            name: name.to_owned(),
            server_name,
            verify,
            authorities,
            identity,
            ends,
            http,
            digest,
            probe,
            client: Arc::new(config),
        })
    }
}

/// What shortens further handshakes with a backend, for a minute: then its certificate is judged again.
#[derive(Debug)]
struct Tickets(Mutex<(Instant, Arc<ClientSessionMemoryCache>)>);

/// For this long.
const RESUMED_FOR: Duration = Duration::from_secs(60);
/// Sessions remembered for one pool.
const RESUMED: usize = 256;

impl Default for Tickets {
    fn default() -> Tickets {
        Tickets(Mutex::new((Instant::now(), Arc::new(ClientSessionMemoryCache::new(RESUMED)))))
    }
}

impl Tickets {
    fn now(&self) -> Arc<ClientSessionMemoryCache> {
        let mut since = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if since.0.elapsed() >= RESUMED_FOR {
            *since = (Instant::now(), Arc::new(ClientSessionMemoryCache::new(RESUMED)));
        }
        since.1.clone()
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, server_name: ServerName<'static>, group: NamedGroup) {
        self.now().set_kx_hint(server_name, group);
    }

    fn kx_hint(&self, server_name: &ServerName<'_>) -> Option<NamedGroup> {
        self.now().kx_hint(server_name)
    }

    fn set_tls12_session(&self, server_name: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.now().set_tls12_session(server_name, value);
    }

    fn tls12_session(&self, server_name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.now().tls12_session(server_name)
    }

    fn remove_tls12_session(&self, server_name: &ServerName<'static>) {
        self.now().remove_tls12_session(server_name);
    }

    fn insert_tls13_ticket(&self, server_name: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.now().insert_tls13_ticket(server_name, value);
    }

    fn take_tls13_ticket(&self, server_name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.now().take_tls13_ticket(server_name)
    }
}

/// How a handshake failed, in the words of health; `None` when it was not TLS that failed.
pub fn failure(error: &io::Error) -> Option<&'static str> {
    error.get_ref()?.downcast_ref::<Error>().map(cause)
}

fn cause(error: &Error) -> &'static str {
    use rustls::CertificateError::*;
    match error {
        Error::InvalidCertificate(Expired | ExpiredContext { .. }) => "expired",
        Error::InvalidCertificate(NotValidYet | NotValidYetContext { .. }) => "not yet valid",
        Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }) => "wrong name",
        // An authority of the same name that did not sign it is not the one.
        Error::InvalidCertificate(UnknownIssuer | BadSignature) => "unknown issuer",
        Error::InvalidCertificate(Revoked) => "revoked",
        Error::InvalidCertificate(_) => "bad certificate",
        Error::AlertReceived(_) => "handshake refused",
        _ => "handshake failed",
    }
}

/// Whether a handshake that failed so may have failed for the client that the backend was told of before; what is wrong with a
/// certificate is the backend's own.
pub fn may_be_the_clients(cause: &str) -> bool {
    matches!(cause, "handshake refused" | "handshake failed")
}

/// How a handshake failed, from the text of an error; the HTTP engine keeps no more of it.
pub fn cause_of_text(text: &str) -> &'static str {
    let words = [
        ("Expired", "expired"),
        ("certificate expired", "expired"),
        ("NotValidYet", "not yet valid"),
        ("not valid yet", "not yet valid"),
        ("NotValidForName", "wrong name"),
        ("not valid for name", "wrong name"),
        ("UnknownIssuer", "unknown issuer"),
        ("BadSignature", "unknown issuer"),
        ("Revoked", "revoked"),
        ("invalid peer certificate", "bad certificate"),
        ("fatal alert", "handshake refused"),
    ];
    words.iter().find(|(word, _)| text.contains(word)).map_or("handshake failed", |(_, cause)| cause)
}

// ---- towards clients ----

/// A chain of certificates with its key, ready to serve.
#[derive(Clone, Debug)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    /// DNS names of its first certificate, in lower case.
    pub names: Vec<String>,
    /// When its first certificate begins and ends, in seconds since 1970.
    pub valid: (i64, i64),
}

/// Reads a chain and its key from PEM.
///
/// # Errors
/// A sentence about the chain, or about the key: which of the two, and what is wrong.
pub fn identity(chain: &[u8], key: &[u8]) -> Result<Identity, (Part, String)> {
    let certificates = CertificateDer::pem_slice_iter(chain)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| (Part::Certificate, format!("is no PEM file of certificates: {error}")))?;
    let Some(first) = certificates.first() else {
        return Err((Part::Certificate, "holds no certificate in PEM form".into()));
    };
    let unreadable = |_| (Part::Certificate, "holds a certificate that cannot be read".to_owned());
    let (_, read) = x509_parser::parse_x509_certificate(first).map_err(unreadable)?;
    let valid = (read.validity().not_before.timestamp(), read.validity().not_after.timestamp());
    let names = names(&read);
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|error| (Part::Key, format!("holds no private key in PEM form: {error}")))?;
    let key = provider()
        .key_provider
        .load_private_key(key)
        .map_err(|error| (Part::Key, format!("holds a private key that cannot be used: {error}")))?;
    let key = CertifiedKey::new(certificates, key);
    match key.keys_match() {
        Ok(()) => Ok(Identity { key: Arc::new(key), names, valid }),
        Err(_) => Err((Part::Key, "is not the key of the certificate".into())),
    }
}

/// Subject of a certificate, as RFC 4514 writes it: the last part first, and no value that could be read as a further part.
fn subject(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, read) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let parts: Vec<_> = read.subject().iter_rdn().collect();
    let of_part = |part: &&RelativeDistinguishedName<'_>| part.iter().map(attribute).collect::<Vec<_>>().join("+");
    Some(parts.iter().rev().map(of_part).collect::<Vec<_>>().join(","))
}

/// One attribute of a name (RFC 4514, section 2.3 and 2.4). What is not ASCII is written in hexadecimal digits, since the text
/// goes into a header.
fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let id = attribute.attr_type().to_id_string();
    let known = ATTRIBUTES.iter().find(|(known, _)| *known == id).map(|(_, name)| *name);
    let (Some(name), Ok(value)) = (known, attribute.as_str()) else {
        let encoded = attribute.attr_value().to_der_vec().unwrap_or_default();
        let digits: String = encoded.iter().map(|byte| format!("{byte:02x}")).collect();
        return format!("{}=#{digits}", known.unwrap_or(&id));
    };
    let mut text = format!("{name}=");
    let last = value.len().saturating_sub(1);
    for (at, byte) in value.bytes().enumerate() {
        let at_an_end = byte == b' ' && (at == 0 || at == last) || byte == b'#' && at == 0;
        match byte {
            b'"' | b'+' | b',' | b';' | b'<' | b'>' | b'\\' => text.extend(['\\', char::from(byte)]),
            _ if at_an_end => text.extend(['\\', char::from(byte)]),
            b' '..=b'~' => text.push(char::from(byte)),
            _ => text.push_str(&format!("\\{byte:02X}")),
        }
    }
    text
}

/// Attributes that have a name (RFC 4514, section 3; the last as OpenSSL writes it).
const ATTRIBUTES: [(&str, &str); 10] = [
    ("2.5.4.3", "CN"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.6", "C"),
    ("2.5.4.9", "STREET"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("1.2.840.113549.1.9.1", "emailAddress"),
];

/// The file that an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The chain.
    Certificate,
    /// The key.
    Key,
}

fn names(certificate: &x509_parser::certificate::X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return Vec::new() };
    let names = extension.value.general_names.iter().filter_map(|name| match name {
        x509_parser::extensions::GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    });
    names.collect()
}

/// Whether a PEM file holds an authority that can be used.
pub fn has_authority(pem: &[u8]) -> bool {
    RootCertStore::empty().add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten()).0 > 0
}

/// What a listener serves, besides its identities.
pub struct Terms<'a> {
    /// Whether TLS 1.2 is refused.
    pub only_1_3: bool,
    /// PEM of the authorities that clients' certificates must come from, and whether a client must have one.
    pub client: Option<(&'a [u8], bool)>,
    /// Encrypts tickets; the same for all generations that ask the same of their clients, so that a reload ends nobody's
    /// resumption. Whoever shares one shares its clients' certificates.
    pub tickets: Arc<dyn ProducesTickets>,
    /// Whether it speaks HTTP, and so offers HTTP/2.
    pub http: bool,
}

/// A maker of tickets with keys of its own, renewed every six hours.
///
/// # Errors
/// A sentence, when the system has no randomness.
pub fn tickets() -> Result<Arc<dyn ProducesTickets>, String> {
    rustls::crypto::aws_lc_rs::Ticketer::new().map_err(|error| format!("TLS tickets: {error}"))
}

/// The server's side for a listener. The first identity is for names that no identity has, and for clients that name
/// none.
///
/// # Errors
/// A sentence.
pub fn server(identities: &[Identity], terms: &Terms<'_>) -> Result<Arc<ServerConfig>, String> {
    let provider = provider();
    let versions: &[&SupportedProtocolVersion] =
        if terms.only_1_3 { &[&rustls::version::TLS13] } else { &[&rustls::version::TLS13, &rustls::version::TLS12] };
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(|error| format!("TLS: {error}"))?;
    let builder = match terms.client {
        None => builder.with_no_client_auth(),
        Some((authorities, required)) => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(CertificateDer::pem_slice_iter(authorities).flatten());
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = if required { verifier } else { verifier.allow_unauthenticated() };
            builder.with_client_cert_verifier(verifier.build().map_err(|error| format!("TLS clients: {error}"))?)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(ByName::new(identities).ok_or("TLS without a certificate")?));
    config.ticketer = terms.tickets.clone();
    if terms.http {
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    }
    Ok(Arc::new(config))
}

/// Finds the identity for a server name: exactly, then by a wildcard for its first label, then the first of all.
#[derive(Debug)]
struct ByName {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    wildcards: HashMap<String, Vec<Arc<CertifiedKey>>>,
    first: Vec<Arc<CertifiedKey>>,
}

impl ByName {
    fn new(identities: &[Identity]) -> Option<ByName> {
        let mut found =
            ByName { exact: HashMap::new(), wildcards: HashMap::new(), first: vec![identities.first()?.key.clone()] };
        for identity in identities {
            for name in &identity.names {
                let list = match name.strip_prefix("*.") {
                    Some(rest) => found.wildcards.entry(rest.to_owned()).or_default(),
                    None => found.exact.entry(name.clone()).or_default(),
                };
                list.push(identity.key.clone());
            }
        }
        Some(found)
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(|name| name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase());
        let named = name.as_deref().and_then(|name| {
            let of_wildcard = || name.split_once('.').and_then(|(_, rest)| self.wildcards.get(rest));
            self.exact.get(name).or_else(of_wildcard)
        });
        // A name may have a certificate for each kind of key; the client says which it understands.
        let list = named.unwrap_or(&self.first);
        let understood = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(hello.signature_schemes()).is_some();
        list.iter().find(understood).or(list.first()).cloned()
    }
}

/// A client's connection, as it is or under TLS.
#[derive(Debug)]
pub enum Stream {
    /// As it is.
    Plain(TcpStream),
    /// Under TLS; boxed, because it is large and the other is not.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// The connection under it.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(stream) => stream.get_ref().0,
        }
    }

    /// The protocol that the handshake agreed on.
    pub fn alpn(&self) -> Option<&[u8]> {
        match self {
            Stream::Plain(_) => None,
            Stream::Tls(stream) => stream.get_ref().1.alpn_protocol(),
        }
    }

    /// Whether the peer showed a certificate in an earlier handshake, which this one goes on from, and it has ended since.
    pub fn has_outlived_its_certificate(&self) -> bool {
        let Stream::Tls(stream) = self else { return false };
        let connection = stream.get_ref().1;
        let resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
        let shown = connection.peer_certificates().filter(|_| resumed).and_then(<[_]>::first);
        shown.and_then(expiry).is_some_and(|end| end <= UnixTime::now().as_secs() as i64)
    }

    /// Subject of the peer's certificate, as RFC 4514 writes it.
    pub fn subject(&self) -> Option<String> {
        match self {
            Stream::Plain(_) => None,
            Stream::Tls(stream) => subject(stream.get_ref().1.peer_certificates()?.first()?),
        }
    }

    /// The connection, where nothing stands between it and the bytes.
    pub fn plain(&self) -> Option<&TcpStream> {
        match self {
            Stream::Plain(socket) => Some(socket),
            Stream::Tls(_) => None,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, DnValue, KeyPair};

    #[test]
    fn a_subject_holds_no_part_that_its_certificate_has_not() {
        let told = |parts: &[(DnType, DnValue)]| {
            let mut parameters = CertificateParams::new(Vec::new()).expect("made here");
            parameters.distinguished_name = rcgen::DistinguishedName::new();
            for (kind, value) in parts {
                parameters.distinguished_name.push(kind.clone(), value.clone());
            }
            subject(parameters.self_signed(&KeyPair::generate().expect("made here")).expect("made here").der())
                .expect("made here")
        };
        let text = |text: &str| DnValue::Utf8String(text.into());
        let two = [(DnType::OrganizationName, text("Corp")), (DnType::CommonName, text("ann"))];
        assert_eq!(told(&two), "CN=ann,O=Corp", "the last part first");
        assert_eq!(told(&[(DnType::CommonName, text("ann,O=Corp+OU=\"x\""))]), "CN=ann\\,O=Corp\\+OU=\\\"x\\\"");
        assert_eq!(told(&[(DnType::CommonName, text(" #a \\ "))]), "CN=\\ #a \\\\\\ ");
        assert_eq!(told(&[(DnType::CommonName, text("#a\r\nX-Admin: 1"))]), "CN=\\#a\\0D\\0AX-Admin: 1");
        assert_eq!(told(&[(DnType::CommonName, text("Jürg"))]), "CN=J\\C3\\BCrg");
        assert_eq!(told(&[(DnType::CustomDnType(vec![1, 2, 3, 4]), text("a,b"))]), "1.2.3.4=#0c03612c62");
        assert_eq!(told(&[]), "");
    }
}
