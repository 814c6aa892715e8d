// Keeps the page itself, not the model, so that it opens without a network. make_app.py fills in version
// and files: with any byte of a file the version changes, and what is kept of an older one is dropped.
const VERSION = "@version@";
const FILES = ["@files@"];
const SCOPE = self.registration.scope; // other apps may lie on the same host
const NAME = `${SCOPE} ${VERSION}`;

async function keep() {
  const cache = await caches.open(NAME);
  await cache.addAll(FILES.map((file) => new Request(file, { cache: "reload" })));
  await self.skipWaiting();
}

async function dropOlder() {
  const names = (await caches.keys()).filter((name) => name.startsWith(`${SCOPE} `) && name !== NAME);
  await Promise.all(names.map((name) => caches.delete(name)));
  await self.clients.claim();
}

async function answer(file, request) {
  const kept = await (await caches.open(NAME)).match(file);
  return kept ?? fetch(request);
}

self.addEventListener("install", (event) => event.waitUntil(keep()));
self.addEventListener("activate", (event) => event.waitUntil(dropOlder()));
self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  const file = url.href.startsWith(SCOPE) ? url.pathname.slice(new URL(SCOPE).pathname.length) || "./" : null;
  if (event.request.method === "GET" && FILES.includes(file)) event.respondWith(answer(file, event.request));
});
